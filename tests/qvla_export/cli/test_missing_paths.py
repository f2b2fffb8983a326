"""A path that must exist is refused while options are read, before anything heavy is imported."""

import inspect
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from places import ROOT
from typer.models import ArgumentInfo

from qvla_export.cli.app import GROUPS, PANELS, name_of
from qvla_export.cli.options import Existing

HEAVY = ("numpy", "onnx", "onnxruntime", "torch", "transformers")
DATA_SET_COMMANDS = ("deploy", "calibrate", "compare", "train")
# Paths that a command writes, or reports on where they are missing.
MAY_BE_MISSING = {
    *("output", "work", "timing_cache", "environment", "export_times", "export_profile"),
    *("record", "modelopt", "engines", "store"),
    *("release sign repository", "release publish repository", "keys new folder"),
    *(f"{command} run" for command in ("deploy", "calibrate", "compare", "bench weights")),
    # They say in their own words what is missing.
    *(f"doctor {name}" for name in ("place", "bundle", "checkpoint", "dataset", "token_file")),
    # It may be an id of the Hub: see the test of data sets.
    *(f"{command} dataset" for command in DATA_SET_COMMANDS),
}
RUN = """
import contextlib, io, json, sys
from qvla_export.cli import main
for line in sys.stdin:
    sys.argv = ["qvla", *json.loads(line)]
    code, said = 0, io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    print(json.dumps([code, sorted(set(sys.modules) & {heavy}), said.getvalue()]))
"""


@dataclass(frozen=True)
class PathParameter:
    command: tuple[str, ...]
    name: str
    # "--policy"; None for a positional one.
    option: str | None
    # Positional ones before it.
    before: int
    existing: Existing | None

    def __str__(self) -> str:
        return f"{' '.join(self.command)} {self.name}"


def commands() -> Iterator[tuple[tuple[str, ...], Callable[..., Any]]]:
    for panel in PANELS.values():
        yield from (((name_of(command),), command) for command in panel)
    for (_, group, _), inner in GROUPS.items():
        yield from (((group, name), command) for name, command in inner.items())


def path_parameters() -> Iterator[PathParameter]:
    """Yield every parameter that is a path, or that must be the place of something."""
    for words, command in commands():
        positional = 0
        for name, parameter in inspect.signature(command).parameters.items():
            kind, info = get_args(parameter.annotation)[:2]
            owner = getattr(getattr(info, "callback", None), "__self__", None)
            existing = owner if isinstance(owner, Existing) else None
            is_argument = isinstance(info, ArgumentInfo)
            if existing or Path in (kind, *get_args(kind)):
                option = None
                if not is_argument:
                    # typer takes the first name of an annotated option for its default.
                    names = [str(text) for text in (info.default, *(info.param_decls or ()))]
                    declared = [text for text in names if text.startswith("--")]
                    option = declared[0] if declared else "--" + name.replace("_", "-")
                before = positional if is_argument else 0
                yield PathParameter(words, name, option, before, existing)
            positional += is_argument


PARAMETERS = tuple(path_parameters())
MUST_EXIST = [parameter for parameter in PARAMETERS if parameter.existing]


def test_every_path_is_one_that_must_exist_or_may_be_missing() -> None:
    others = [p for p in PARAMETERS if not p.existing]
    unknown = [str(p) for p in others if not {p.name, str(p)} & MAY_BE_MISSING]
    assert not unknown, "must they exist (cli/options.py: Existing), or are they written?"
    assert {p.command[0] for p in MUST_EXIST} >= {"deploy", "plan", "verify", "serve", "replay"}


@dataclass(frozen=True)
class Refusal:
    code: int
    # Heavy modules that are loaded.
    heavy: list[str]
    err: str


def refusals(commands: list[list[str]]) -> list[Refusal]:
    """Run commands one after another in a process of their own: what one loads, the next has."""
    done = subprocess.run(
        [sys.executable, "-c", RUN.replace("{heavy}", str(set(HEAVY)))],
        input="".join(json.dumps(words) + "\n" for words in commands),
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    return [Refusal(*json.loads(line)) for line in done.stdout.splitlines()]


@cache
def refusals_of_missing(missing: str) -> dict[PathParameter, Refusal]:
    commands = []
    for parameter in MUST_EXIST:
        place = [missing] if parameter.option is None else [parameter.option, missing]
        commands.append([*parameter.command, *[str(ROOT)] * parameter.before, *place])
    return dict(zip(MUST_EXIST, refusals(commands), strict=True))


@pytest.mark.parametrize("parameter", MUST_EXIST, ids=str)
def test_a_missing_path_is_refused_before_heavy_imports(parameter: PathParameter) -> None:
    missing = "no/such/place"
    refusal = refusals_of_missing(missing)[parameter]
    assert (refusal.code, refusal.heavy) == (2, []), refusal.err
    (line,) = refusal.err.splitlines()
    assert parameter.existing is not None
    said = f"{parameter.existing.what} not found: {missing}; {parameter.existing.remedy}"
    assert line == f"error: {said}"


@pytest.mark.parametrize("command", DATA_SET_COMMANDS)
def test_a_data_set_that_is_nowhere_is_refused_before_heavy_imports(
    command: str, tmp_path: Path
) -> None:
    missing = str(tmp_path / "missing")
    place = [missing, "out"] if command == "train" else ["--dataset", missing]
    (refusal,) = refusals([[command, *place]])
    assert (refusal.code, refusal.heavy) == (2, []), refusal.err
    (line,) = refusal.err.splitlines()
    assert line.startswith(f"error: data set not found: {missing}; ")


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = f"import sys, qvla_export.cli.app; print(sorted(set(sys.modules) & {set(HEAVY)}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_words_and_addresses_stand_instead_of_paths() -> None:
    either = Existing("bundle", "make it", words=("golden",), urls=True)
    for value in ("golden", "http://robot:8000", None, ROOT, [ROOT, str(ROOT)]):
        assert either.require(value) == value
    with pytest.raises(ValueError, match="bundle not found: nowhere; make it"):
        either.require([ROOT, "nowhere"])
