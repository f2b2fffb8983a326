"""Generates what the pages say of the code from the code, at each build, so that it stays true.

A page asks for a part with a line such as `<!-- generated: commands -->`.
"""

import ast
import html
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import typer

ROOT = Path(__file__).resolve().parents[2]
# mkdocs loads a hook by its file, with neither the packages nor the tests' helpers on the path.
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "helpers")]

import house  # noqa: E402  # found through the line above

import qvla_export  # noqa: E402
from qvla_export.cli.app import app  # noqa: E402

_MARK = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace each mark of a page by what it stands for."""
    return _MARK.sub(lambda mark: GENERATED[mark[1]](), markdown)


def commands() -> str:
    """Return a section for each command, under the panels of `qvla --help`."""
    group = typer.main.get_command(app)
    context = typer.Context(group, info_name="qvla")
    panels: dict[str, list[str]] = {}
    for panel, command, inner in _leaves(group, context):
        panels.setdefault(panel, []).append(_section(command, inner))
    return "\n\n".join("\n\n".join([f"## {title}", *texts]) for title, texts in panels.items())


def library() -> str:
    """Return a line for mkdocstrings for each public name, in the order of `__all__`."""
    names = [name for name in qvla_export.__all__ if not name.startswith("_")]
    return "\n\n".join(f"::: qvla_export.{name}" for name in names)


def rooms() -> str:
    """Return the rooms from ground to roof, each with what the docstrings of its packages say."""
    packages = sorted(name for name in house.MODULES if house.MODULES[name].name == "__init__.py")
    rows = [
        f"| {_name(package, room)} | {_plain(docstring(package))} |"
        for room in house.FLOORS
        for package in packages
        if package == room or package.startswith(f"{room}.")
    ]
    return "\n".join(["| room | what lives there |", "| --- | --- |", *rows])


def _name(package: str, room: str) -> str:
    """Return a room's name, or that of a package within it, moved to the right."""
    inner = package.removeprefix(f"{room}.")
    return f"`{room}`" if package == room else f"&emsp;&emsp;`{inner}`"


def docstring(package: str) -> str:
    """Return a package's docstring.

    Raises:
        ValueError: it has none.
    """
    path = ROOT.joinpath(*package.split("."), "__init__.py")
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    if not text:
        raise ValueError(f"{path} must say in a docstring what lives in {package}")
    return text


def _leaves(group: Any, context: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield the panel, the command and its context, of groups within the group too."""
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        inner = typer.Context(command, info_name=name, parent=context)
        panel = command.rich_help_panel
        title = panel if isinstance(panel, str) else "Commands"
        if hasattr(command, "list_commands"):
            yield from ((title, *found[1:]) for found in _leaves(command, inner))
        elif not command.hidden:
            yield title, command, inner


def _section(command: Any, context: Any) -> str:
    usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
    help_text = "\n\n".join(map(_plain, (command.help or "").split("\n\n")))
    section = [f"### `{context.command_path}`", help_text, f"```text\n{usage}\n```"]
    records = [parameter.get_help_record(context) for parameter in command.params]
    rows = [f"| `{names}` | {_plain(meaning)} |" for names, meaning in records]
    if rows:
        section.append("\n".join(["| argument or option | meaning |", "| --- | --- |", *rows]))
    return "\n\n".join(section)


def _plain(text: str) -> str:
    """Return a text on one line with nothing in it taken for markup, but for `code`."""
    pieces = " ".join(text.split()).split("`")
    pieces[::2] = [
        re.sub(r"([|*_\[\]])", r"\\\1", html.escape(piece, quote=False)) for piece in pieces[::2]
    ]
    return "`".join(pieces)


GENERATED: dict[str, Callable[[], str]] = {
    "commands": commands,
    "library": library,
    "rooms": rooms,
}
