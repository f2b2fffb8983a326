"""Every module of the robot side imports where only the base dependencies are installed."""

from house import HOST_ONLY, HOST_TOOLS, OPENED_BY_NAME
from robot_runs import run_on_robot

# Of JetPack or of one target; an engine that needs one is loaded for that target only.
RUNTIMES = ("pycuda", "tensorrt", "tensorrt_rtx")

_IMPORT_ALL = f"""
import importlib, pkgutil, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HOST_ONLY!r}:
            raise ModuleNotFoundError(name + " is not installed on the robot", name=name)

sys.meta_path.insert(0, Blocked())
count = 0
for package in ("engines", "jetson"):
    package = importlib.import_module(package)
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name.startswith({HOST_TOOLS + OPENED_BY_NAME!r}):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            if error.name not in {RUNTIMES!r}:
                raise
        count += 1
print(count)
"""


def test_every_module_imports_without_host_libraries() -> None:
    assert int(run_on_robot("-c", _IMPORT_ALL)) >= 15


def test_the_command_starts_without_host_libraries() -> None:
    listed = run_on_robot(
        "-c",
        "import sys\n"
        "from qvla_export.cli import main\n"
        "sys.argv = ['qvla', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print('loaded', sorted({HOST_ONLY!r} & set(sys.modules)))",
    )
    assert listed.endswith("loaded []\n")
