"""The structure as the code has it: modules, rooms, imports; and what a robot does not have."""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from places import ROOT

PACKAGES = ("calibration", "qvla_export", "engines", "jetson")
# Rooms from ground to roof; imports go down only. docs/development.md shows them.
FLOORS = (
    "qvla_export.shared",
    "qvla_export.quantizer",
    "qvla_export.latency_model",
    "qvla_export.policies",
    "qvla_export.measurement",
    "qvla_export.sensitivity",
    "qvla_export.allocation",
    "qvla_export.graph",
    "qvla_export.baselines",
    "qvla_export.report",
    "qvla_export.comparison",
    "engines",
    "calibration",
    "jetson",
    "qvla_export.pipeline",
    "qvla_export.cli",
)


# Installed by the extras `host` and `sim` only.
HOST_ONLY = {
    "gymnasium",
    "h5py",
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
    "triton",
}
# Of the host although its package is the robot's; test_imports: nothing else reaches it.
HOST_TOOLS = ("engines.check", "engines.bench")
# Opened by name, on a machine with a GPU and torch; nothing else of the robot side reaches them.
OPENED_BY_NAME = ("engines.kernels", "engines.torch")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES: Mapping[str, Path] = {
    module_name(path): path for package in PACKAGES for path in (ROOT / package).rglob("*.py")
}
# The public surface hands names on from every room, and `python -m qvla_export` is the command.
SURFACE = ("qvla_export", "qvla_export.__main__")


def room_of(module: str) -> str:
    """Return the room of a module: a folder of `qvla_export`, or another package whole."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] == "qvla_export" else parts[0]


def top(name: str) -> str:
    return name.partition(".")[0]


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text())


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
def imports_of(module: str, typed: bool = False) -> frozenset[str]:
    """Dotted names a module imports at any level; `from a import b` gives a and a.b.

    With `typed`, also what only a type checker reads.
    """
    tree = tree_of(module)
    found = set()
    for node in ast.walk(tree) if typed else run_nodes(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module} line {node.lineno}: write the absolute import"
            found |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def our_imports(module: str) -> set[str]:
    """Return the modules of ours that one imports, for types too; packages' docstrings left out."""
    found = imports_of(module, typed=True) & set(MODULES)
    return {name for name in found if MODULES[name].name != "__init__.py" or name in SURFACE}


def circles(arrows: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected groups of more than one node (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(arrows.get(node, ())):
            if other not in index:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], index[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in sorted(arrows):
        if node not in index:
            visit(node)
    return found


def file_arrows() -> dict[str, set[str]]:
    return {module: our_imports(module) for module in MODULES if module not in SURFACE}


def room_arrows() -> dict[str, set[str]]:
    arrows: dict[str, set[str]] = defaultdict(set)
    for module, others in file_arrows().items():
        arrows[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    return dict(arrows)


def functions_of(module: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
