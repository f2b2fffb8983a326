"""The house keeps its rules: rooms, words, sizes. docs/development.md says why."""

import ast
from collections import Counter, defaultdict

import pytest
from house import (
    FLOORS,
    HOST_TOOLS,
    MODULES,
    SURFACE,
    circles,
    file_arrows,
    functions_of,
    imports_of,
    our_imports,
    room_arrows,
    room_of,
    top,
    tree_of,
)
from places import ROOT

LIBRARY = sorted(name for name in MODULES if name not in SURFACE)
# Which other packages' rooms a package reaches; pipeline and cli cross freely.
MAY_CROSS = {
    "engines": {"qvla_export.shared"},
    "jetson": {"qvla_export.shared", "engines"},
    "calibration": {"qvla_export.shared", "qvla_export.policies"},
    "qvla_export": set(),
}
COMMAND = "qvla_export.cli"
FREE = ("qvla_export.pipeline", COMMAND)
FAMILIES = {path.parent.name for path in (ROOT / "qvla_export" / "policies").glob("*/__init__.py")}
MOST_FILES = 30
MOST_PARAMETERS = 7
# All of the command; and a function there without its options.
MOST_COMMAND_LINES = 4_600
MOST_BODY_LINES = 40
# Every family's folder holds the same files; these two names say what they say anywhere.
MAY_REPEAT = {"base", "registry", "__init__", "__main__"}


def in_command(module: str) -> bool:
    return room_of(module) == COMMAND


def test_the_list_of_rooms_is_whole() -> None:
    rooms = {room_of(module) for module in LIBRARY}
    assert rooms == set(FLOORS)


def floor_of(module: str) -> int:
    return FLOORS.index(room_of(module))


def test_imports_go_down() -> None:
    climbing = {
        module: above
        for module in LIBRARY
        if (above := sorted(n for n in our_imports(module) if floor_of(n) > floor_of(module)))
    }
    assert not climbing, "each imports what stands above it"


def test_nothing_imports_in_a_circle() -> None:
    assert not circles(file_arrows())
    assert not circles(room_arrows())


def test_packages_cross_where_they_may() -> None:
    # Tools are of the host, though they live beside the engines they judge.
    bound = [m for m in LIBRARY if not m.startswith((*FREE, *HOST_TOOLS))]
    crossing = {}
    for module in bound:
        package = top(module)
        foreign = {room_of(name) for name in our_imports(module) if top(name) != package}
        if not foreign <= MAY_CROSS[package]:
            crossing[module] = sorted(foreign)
    assert not crossing


def test_nobody_imports_the_command() -> None:
    importing = {
        module: found
        for module in LIBRARY
        if not in_command(module)
        and (found := [n for n in imports_of(module, typed=True) if n.startswith(COMMAND)])
    }
    assert not importing


def test_a_family_is_named_at_home_only() -> None:
    homes = tuple(f"qvla_export.policies.{family}" for family in FAMILIES)
    may = ("qvla_export.policies.families", "calibration.training", *homes)
    imported, compared = {}, {}
    for module in LIBRARY:
        if module.startswith(may):
            continue
        if names := sorted(name for name in our_imports(module) if name.startswith(homes)):
            imported[module] = names
        constants = [
            constant.value
            for node in ast.walk(tree_of(module))
            if isinstance(node, ast.Compare | ast.MatchValue)
            for constant in ast.walk(node)
            if isinstance(constant, ast.Constant) and constant.value in FAMILIES
        ]
        if constants:
            compared[module] = constants
    assert not imported, "a family is imported"
    assert not compared, "something is compared with a family's name"


def test_no_folder_is_crowded() -> None:
    counts = Counter(path.parent for path in MODULES.values() if path.name != "__init__.py")
    assert {str(p.relative_to(ROOT)): n for p, n in counts.items() if n > MOST_FILES} == {}


def test_a_room_has_one_module_of_a_name() -> None:
    names = defaultdict(list)
    for module in LIBRARY:
        name = module.rpartition(".")[2]
        if name not in MAY_REPEAT and MODULES[module].name != "__init__.py":
            home = room_of(module)
            family = module.split(".")[2] if home == "qvla_export.policies" else ""
            names[home, family if family in FAMILIES else "", name].append(module)
    assert not [modules for modules in names.values() if len(modules) > 1]


@pytest.mark.parametrize("package", sorted(MAY_CROSS))
def test_a_package_has_one_public_class_of_a_name(package: str) -> None:
    homes = defaultdict(list)
    for module in LIBRARY:
        if top(module) == package:
            for node in tree_of(module).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    homes[node.name].append(module)
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)]
    return [name for name in names if name not in ("self", "cls")]


def test_functions_take_few_parameters() -> None:
    many = {
        f"{module}.{function.name}": count
        for module in LIBRARY
        if not in_command(module)
        for function in functions_of(module)
        if (count := len(parameters(function))) > MOST_PARAMETERS
    }
    assert not many, "pass a frozen dataclass whole"


def test_a_command_is_parse_call_print() -> None:
    lines = {m: len(p.read_text().splitlines()) for m, p in MODULES.items() if in_command(m)}
    assert sum(lines.values()) <= MOST_COMMAND_LINES
    bodies = {
        f"{module}.{function.name}": (function.end_lineno or 0) - function.body[0].lineno + 1
        for module in lines
        for function in functions_of(module)
    }
    assert {name: length for name, length in bodies.items() if length > MOST_BODY_LINES} == {}


def test_the_pipeline_prints_nothing() -> None:
    printers = {"click", "rich", "typer"}
    printing = []
    for module in LIBRARY:
        if not module.startswith("qvla_export.pipeline"):
            continue
        calls = [node.func for node in ast.walk(tree_of(module)) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        if "print" in names or printers & {top(n) for n in imports_of(module, typed=True)}:
            printing.append(module)
    assert not printing
