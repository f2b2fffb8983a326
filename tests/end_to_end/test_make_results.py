"""`make results`, with a stand-in for `qvla`: its shell runs, and every command is one."""

import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from places import ROOT

from qvla_export.cli.app import app

# Writes down how it was called, the evaluation that it was told to write, and a plan's figures.
_STAND_IN = f"""#!{sys.executable}
import os, shlex, sys
words = sys.argv[1:]
with open(os.path.join(os.path.dirname(sys.argv[0]), "called"), "a") as called:
    called.write(shlex.join(words) + "\\n")
if words[0] == "evaluate":
    open(words[words.index("--output") + 1], "a").close()
if "--json" in words:
    print('{{"weight_bytes": 2139035}}')
"""
_BEFORE = ("demo", "baselines-env", "networks")
# What two evaluations must share to be paired.
_PAIRED_BY = ("tasks", "seed", "execute", "shift", "control")


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> list[list[str]]:
    """Return the arguments of each `qvla` that `make results` calls, in turn."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    folder = tmp_path_factory.mktemp("results")
    (folder / "qvla").write_text(_STAND_IN)
    (folder / "qvla").chmod(0o755)
    (folder / "python").symlink_to(sys.executable)
    group = folder / "group"
    group.mkdir()
    # Those that it depends on are tested elsewhere, or install packages.
    made = subprocess.run(
        [
            *("make", "--silent", *(f"--old-file={name}" for name in _BEFORE), "results"),
            *(f"BIN={folder}", f"GROUPED={group}", f"PRECISE={folder / 'precise'}"),
            f"PICTURES={folder / 'pictures'}",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    return [shlex.split(line) for line in (folder / "called").read_text().splitlines()]


def test_every_command_and_value_is_one(calls: list[list[str]]) -> None:
    assert len(calls) > 100
    for words in calls:
        _options(words)


def test_pairs_are_of_the_same_episodes_and_made_in_order(calls: list[list[str]]) -> None:
    written: dict[Path, dict[str, Any]] = {}
    for options in [_options(words) for words in calls if words[0] == "evaluate"]:
        if (other := options["against"]) is not None:
            assert [options[name] for name in _PAIRED_BY] == [
                written[other][name] for name in _PAIRED_BY
            ], options
        assert options["output"] not in written, "each evaluation is made once"
        written[options["output"]] = options
    assert len(written) > 50


@cache
def _application() -> Any:
    return typer.main.get_command(app)


def _options(words: list[str]) -> dict[str, Any]:
    """Read a command line as `qvla` does, except that no path need exist; return its values.

    Raises:
        click.UsageError: as `qvla` would answer.
    """
    command = _application()
    context = command.context_class(command)
    while hasattr(command, "commands"):
        name, *words = words
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
        context = command.context_class(command, info_name=name, parent=context)
    texts, rest, _ = command.make_parser(context).parse_args(list(words))
    assert not rest, f"{rest} belongs to no option"
    for parameter in command.params:
        parameter.callback = None  # what looks whether a path exists
        parameter.handle_parse_result(context, texts, rest)
    values: dict[str, Any] = context.params
    return values
