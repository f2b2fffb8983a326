"""The robot side reaches nothing a robot does not install."""

import ast
import importlib
from pathlib import Path

import pytest
from house import HOST_ONLY, HOST_TOOLS, MODULES, PACKAGES, imports_of, top
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
    m for m in LIBRARY if top(m) in ("engines", "jetson") and not m.startswith(HOST_TOOLS)
]


@pytest.mark.parametrize("module", ROBOT_SIDE)
def test_the_robot_side_reaches_no_host_library(module: str) -> None:
    importers = reached(module)
    for name in importers:
        wrong = {library for library in map(top, imports_of(name)) if library in HOST_ONLY}
        chain = [name]
        while chain[-1] != module:
            chain.append(importers[chain[-1]])
        assert not wrong, f"{' -> '.join(reversed(chain))} imports {sorted(wrong)}"


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
    assert not imports_of(package)


def test_every_folder_of_code_is_a_package() -> None:
    folders = {path.parent for path in MODULES.values()}
    assert not [folder for folder in sorted(folders) if not (folder / "__init__.py").is_file()]
