"""Imports point one way, and the robot side reaches nothing a robot does not install."""

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("calibration", "qvla_export", "engines", "jetson")
# What a module of the package may import of the other three.
MAY_IMPORT = {
    "calibration": {"qvla_export"},
    "qvla_export": set(),
    "engines": {"qvla_export"},
    "jetson": {"engines", "qvla_export"},
}
# Installed by the extras `host` and `sim` only.
HOST_ONLY = {
    "gymnasium",
    "jinja2",
    "matplotlib",
    "metaworld",
    "ml_dtypes",
    "mujoco",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "OpenGL",
    "pyarrow",
    "scipy",
    "torch",
    "transformers",
}
# Of the host although its package is the robot's; that nothing else reaches it is tested below.
HOST_TOOLS = ("engines.check", "engines.bench")
# The command reaches across the stages, inside its functions.
COMMAND = ("qvla_export.cli", "qvla_export.__main__")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")
}
LIBRARY = sorted(name for name in MODULES if not name.startswith(COMMAND))


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def run_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree, leaving out what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(node, ast.If) and is_type_checking(node) and child in node.body:
            continue
        yield child
        yield from run_nodes(child)


@cache
def imports_of(module: str) -> frozenset[str]:
    """Dotted names a module imports at any level; `from a import b` gives a and a.b."""
    found = set()
    for node in run_nodes(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: write the absolute import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def top(name: str) -> str:
    return name.partition(".")[0]


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


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_point_one_way(module: str) -> None:
    others = set(PACKAGES) - {top(module)}
    foreign = {name for name in imports_of(module) if top(name) in others}
    wrong = sorted(name for name in foreign if top(name) not in MAY_IMPORT[top(module)])
    assert not wrong, f"{module} may import {MAY_IMPORT[top(module)] or 'none'}, not {wrong}"
    commands = sorted(name for name in imports_of(module) if name.startswith(COMMAND))
    assert not commands, f"{module} is a library module; it must not import {commands}"


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
