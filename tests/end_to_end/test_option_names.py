"""Options that errors, help and pages name exist, and belong to the command they are named with."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from house import MODULES, tree_of
from places import ROOT

from qvla_export.cli.app import app
from qvla_export.shared.errors import QvlaError

# Options of other programs that the texts name: pip, rsync, systemctl, ROS, torchrun, trtexec,
# uv, pex, docker, systemd-run, tegrastats, jetson_clocks, ps, du, venv, hf, h5repack, tfds; of
# openvla-oft's script.
_OF_OTHERS = {
    *("--delete", "--checksum", "--list-devices", "--lock", "--system-site-packages"),
    *("--no-deps", "--nproc-per-node", "--property", "--show", "--quiet", "--ros-args", "--now"),
    *("--verbose", "--value", "--gpus", "--runtime", "--timing-cache", "--noDataTransfers"),
    *("--interval", "--fan", "--sort", "--max-depth"),
    *("--base_checkpoint", "--lora_finetuned_checkpoint_dir"),
    *("--repo-type", "--local-dir", "--merge", "--file_format"),
    *("--hash", "--wheel", "--out-dir", "--generate-hashes", "--only-binary", "--no-header"),
    *("--no-annotate", "--python-version", "--python-platform", "--output-file", "--platform"),
    *("--abi", "--implementation", "--dest", "--require-hashes", "--disable-pip-version-check"),
    *("--requirement", "--constraints", "--complete-platform", "--no-build", "--venv"),
    *("--venv-system-site-packages", "--console-script", "--python-shebang", "--pex-root"),
    *("--disable-cache", "--pre-resolved-dist"),
    *("--wait", "--pipe", "--collect", "--unit", "--setenv", "--no-block", "--inline"),
    *("--accept-license", "--showlogs", "--network", "--external-device", "--no-flash"),
    *("--massflash", "--restore", "--isolation", "--format"),
}
_OPTION = re.compile(r"(?<![\w/-])(--[a-zA-Z][\w-]*)")
# Variables of a page's style look like options: var(--ink), --ink: black; so does a file's name.
_STYLE = re.compile(r"var\(--|--[\w-]+:\s*[#\w(]|--STEP_")
_STYLE_MODULES = ("qvla_export.report.svg",)
_COMMAND = re.compile(r"\bqvla ((?:(?:bench|release|keys|robot|runtime|flash) )?[a-z][a-z-]*)")
# Where what follows a command is no longer its: the next sentence, or half of one.
_END = re.compile(r"[;:)`]|\. |, (?:or|and|which|then) | \| |\bqvla ")


def options_of(command: Any) -> set[str]:
    return {
        option
        for parameter in command.params
        for option in (*parameter.opts, *getattr(parameter, "secondary_opts", ()))
    } | {"--help"}


@cache
def commands() -> dict[str, set[str]]:
    group: Any = typer.main.get_command(app)
    known = {}
    for name, command in group.commands.items():
        for inner, benched in getattr(command, "commands", {}).items():
            known[f"{name} {inner}"] = options_of(benched)
        known[name] = options_of(command)
    return known


@cache
def all_options() -> set[str]:
    group: Any = typer.main.get_command(app)
    scripts = set()
    # Small programs of ours that workers and installers are started as parse their own.
    for path in MODULES.values():
        scripts |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', path.read_text()))
    return {option for options in commands().values() for option in options} | {
        *options_of(group), *scripts,
    }  # fmt: skip


def problems_of(text: str) -> Iterator[str]:
    if _STYLE.search(text):
        return
    for option in _OPTION.findall(text):
        if option not in all_options() | _OF_OTHERS:
            yield f"no command has {option}: {text[:160]!r}"
    for found in _COMMAND.finditer(text):
        if found[1] not in commands():
            continue  # "qvla checkpoints are ..."; test_pages judges command lines
        rest = text[found.end() :]
        end = _END.search(rest)
        for option in _OPTION.findall(rest[: end.start() if end else len(rest)]):
            if option not in commands()[found[1]]:
                yield f"qvla {found[1]} has no {option}: {text[:160]!r}"


def texts_of(module: str) -> Iterator[str]:
    """Yield the strings of a module, docstrings left out, with a mark for each value put in."""
    tree = tree_of(module)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    skipped = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            skipped |= {id(part) for part in node.values}
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )
        elif isinstance(node, ast.Constant) and id(node) not in skipped:
            yield node.value if isinstance(node.value, str) else ""


def test_errors_and_help_name_options_that_exist() -> None:
    found = [
        f"{module}: {problem}"
        for module in MODULES
        if module not in _STYLE_MODULES
        for text in texts_of(module)
        for problem in problems_of(" ".join(text.split()))
    ]
    assert not found, "\n".join(found)


def test_a_missing_path_is_said_with_an_option_of_the_command() -> None:
    group: Any = typer.main.get_command(app)
    every = {}
    for name, command in group.commands.items():
        inner = getattr(command, "commands", None)
        every |= {name: command} if inner is None else {f"{name} {n}": c for n, c in inner.items()}
    wrong = []
    for name, command in every.items():
        for parameter in command.params:
            try:
                parameter.callback(None, parameter, "no-such-place")
            except QvlaError as error:
                wrong += [f"{name}: {error}" for o in _own_options(str(error)) - commands()[name]]
            except TypeError:
                continue  # it has no callback
    assert not wrong


def _own_options(text: str) -> set[str]:
    """Return the options of a message that it does not name with another command."""
    return set(_OPTION.findall(_COMMAND.split(text)[0]))


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name
)
def test_pages_name_options_that_exist(page: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", page.read_text())
    known = all_options() | _OF_OTHERS
    wrong = [
        option
        for span in spans
        if span.startswith(("--", "qvla "))
        for option in _OPTION.findall(span)
        if option not in known
    ]
    assert not wrong


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("give --metadata-prt", "no command has --metadata-prt"),
        ("make it first with: qvla export --samples 3", "qvla export has no --samples"),
        (
            "record it first with: qvla serve --rate, or qvla run --record",
            "qvla serve has no --rate",
        ),
        ("time it: qvla bench server --bits 3", "qvla bench server has no --bits"),
        ("qvla doctor --checkpoint X; see --bits", ""),
        ("color: var(--ink)", ""),
    ],
)
def test_the_rule_sees_what_is_wrong(text: str, problem: str) -> None:
    found = list(problems_of(text))
    assert bool(found) == bool(problem) and all(problem in line for line in found)
