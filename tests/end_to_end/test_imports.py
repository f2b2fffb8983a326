"""The robot side reaches nothing a robot does not install."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from house import (
    HOST_ONLY,
    HOST_TOOLS,
    MODULES,
    OPENED_BY_NAME,
    PACKAGES,
    imports_of,
    top,
)
from places import ROOT

# The command reaches across the stages, inside its functions.
COMMAND = ("qvla_export.cli", "qvla_export.__main__")
LIBRARY = sorted(name for name in MODULES if not name.startswith(COMMAND))


def reached(start: str) -> dict[str, str]:
    """Return our modules that importing and using one reaches, each with its importer."""
    importers = {start: start}
    todo = [start]
    while todo:
        module = todo.pop()
        for name in imports_of(module):
            if name in MODULES and name not in importers:
                importers[name] = module
                todo.append(name)
    return importers


ROBOT_SIDE = [
    m
    for m in LIBRARY
    if top(m) in ("engines", "jetson") and not m.startswith(HOST_TOOLS + OPENED_BY_NAME)
]


# Rooms of mathematics; a plan can be made where there is no torch.
NUMPY_ONLY = ("shared", "quantizer", "latency_model", "allocation")


def require_reaches_none(module: str, libraries: set[str]) -> None:
    importers = reached(module)
    for name in importers:
        wrong = set(map(top, imports_of(name))) & libraries
        chain = [name]
        while chain[-1] != module:
            chain.append(importers[chain[-1]])
        assert not wrong, f"{' -> '.join(reversed(chain))} imports {sorted(wrong)}"


@pytest.mark.parametrize("module", ROBOT_SIDE)
def test_the_robot_side_reaches_no_host_library(module: str) -> None:
    require_reaches_none(module, HOST_ONLY)


@pytest.mark.parametrize(
    "module", [m for m in LIBRARY if m.split(".")[1:2] and m.split(".")[1] in NUMPY_ONLY]
)
def test_rooms_of_mathematics_reach_no_host_library(module: str) -> None:
    require_reaches_none(module, HOST_ONLY)


def test_rooms_of_mathematics_import_where_host_libraries_are_missing() -> None:
    """In a process of its own, which finds none of them."""
    modules = [m for m in LIBRARY if any(m.startswith(f"qvla_export.{r}.") for r in NUMPY_ONLY)]
    assert len(modules) > 30
    code = f"""
import importlib, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {sorted(HOST_ONLY)!r}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
for module in {modules!r}:
    importlib.import_module(module)
try:
    importlib.import_module("qvla_export.measurement.backward")
except ModuleNotFoundError as error:
    print("missing", error)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    # The libraries were out of reach indeed.
    assert run.stdout == "missing torch\n"


@pytest.mark.parametrize("module", [m for m in MODULES if m.startswith(COMMAND)])
def test_the_command_reaches_across_inside_functions_only(module: str) -> None:
    eager = set()
    for node in ast.parse(MODULES[module].read_text()).body:
        if isinstance(node, ast.Import):
            eager |= {top(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            eager.add(top(str(node.module)))
    assert not eager & (HOST_ONLY | set(PACKAGES) - {"qvla_export"})


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_are_ours(package: str) -> None:
    file = Path(str(importlib.import_module(package).__file__)).resolve()
    assert file == ROOT / package / "__init__.py", (
        f"another distribution has taken the name {package!r}: it is imported from {file}. "
        "Uninstall what put it there, or set PYTHONPATH to this repository, which goes first."
    )


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_imports_nothing(package: str) -> None:
    # The public surface of `qvla_export` names the extra of a library that is missing.
    imports = {name for name in imports_of(package) if "shared.errors" not in name}
    assert {top(name) for name in imports} <= sys.stdlib_module_names


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert not [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()]
