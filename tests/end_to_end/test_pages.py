"""The pages are true: links lead somewhere, commands and messages are those of the code."""

import ast
import dataclasses
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from house import MODULES, tree_of
from places import ROOT

import qvla_export
from qvla_export.cli.app import app
from qvla_export.policies.oft.config import PRESETS, OftConfig

README = ROOT / "README.md"
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *DOCS]
MOST_WORDS = 900  # of the README, tables and code included
# Of what a page loads by itself; links that a reader may follow are no such thing.
_LOADED = re.compile(r'<(?:script|img|iframe|source)[^>]*\bsrc="([^"]+)"|<link[^>]*href="([^"]+)"')
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_BLOCK = re.compile(r"^ *```[^\n]*\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(qvla [^`\n]+)`")
_QUOTE = re.compile(r"(?:^>.*\n?)+", re.MULTILINE)
# A value in a quoted message is in italics; what is left out of one is three dots.
_FILLED_IN = re.compile(r"(?<!\\)\*.*?(?<!\\)\*")
_LEFT_OUT = "…"
_FEWEST_LETTERS = 8  # fewer are punctuation between two values


def test_the_readme_is_short() -> None:
    assert len(README.read_text().split()) <= MOST_WORDS


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in _LINK.findall(page.read_text()) if "://" not in link]
    targets = {link: page.parent / link.partition("#")[0] for link in links if link[0] != "#"}
    assert not [link for link, target in targets.items() if not target.exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_headings(page: Path) -> None:
    for link in _LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if anchor and "://" not in link:
            target = page.parent / path if path else page
            assert anchor in _anchors(target), f"{page.name} links to {link}"


def test_the_pages_build_without_a_warning_and_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir"]
    built = subprocess.run(
        [*command, str(tmp_path / "site")],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},  # about mkdocs' future, as in the Makefile
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCS)  # and the page that says that there is none
    for page in pages:
        loaded = ["".join(found) for found in _LOADED.findall(page.read_text())]
        assert loaded and not [url for url in loaded if "://" in url], page.name
    library = (tmp_path / "site" / "library.html").read_text()
    public = [name for name in qvla_export.__all__ if not name.startswith("_")]
    assert not [name for name in public if f'id="qvla_export.{name}"' not in library]


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda page: page.name)
def test_commands_are_those_of_the_code(page: Path) -> None:
    group = typer.main.get_command(app)
    problems = [
        f"{line}: {problem}" for line in _command_lines(page) if (problem := _problem(line, group))
    ]
    assert not problems, "\n".join(problems)


def test_messages_are_those_of_the_code() -> None:
    page = ROOT / "docs" / "troubleshooting.md"
    quotes = _QUOTE.findall(page.read_text())
    assert len(quotes) > 10
    wrong = [
        piece
        for quote in quotes
        for piece in _pieces(quote)
        if not any(piece in text for text in _texts())
    ]
    assert not wrong, "the code says nothing like this: " + "\n".join(wrong)


def test_every_field_of_the_policy_configuration_is_explained() -> None:
    text = (ROOT / "docs" / "own-checkpoint.md").read_text()
    missing = [
        field.name for field in dataclasses.fields(OftConfig) if f"| `{field.name}` |" not in text
    ]
    assert not missing
    assert not [name for name in PRESETS if f"| `{name}` |" not in text]


@pytest.mark.parametrize(
    "package", [name for name, path in MODULES.items() if path.name == "__init__.py"]
)
def test_every_package_says_what_lives_there(package: str) -> None:
    assert ast.get_docstring(tree_of(package)), f"{package}/__init__.py has no docstring"


def _anchors(page: Path) -> set[str]:
    """Return the anchors that Python-Markdown, and code hosts alike, make of the headings."""
    headings = re.findall(r"^#+ +(.+)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}


def _command_lines(page: Path) -> Iterator[str]:
    """Yield what follows each `qvla` in code blocks, and in code within a line."""
    text = page.read_text()
    blocks = [block.replace("\\\n", " ") for block in _BLOCK.findall(text)]
    for line in [line for block in blocks for line in block.splitlines()] + _INLINE.findall(text):
        words = line.partition(" #")[0]
        for command in re.split(r"&&|;|\|", words):
            found = re.match(r".*?(?:\bqvla|-m qvla_export) +(?![-(])(.+)", command)
            if found and not command.lstrip().startswith(("git", "rsync", "pip")):
                yield found[1].strip()


def _problem(line: str, group: Any) -> str | None:
    """Say which command or option of a line does not exist; None if all do."""
    name, *words = shlex.split(line)
    if name.isupper():
        return None  # stands for any
    if name not in group.commands:
        return f"no command {name}"
    inner = group.commands[name]
    if hasattr(inner, "commands"):
        return _problem(" ".join(map(shlex.quote, words)), inner) if words else None
    known = {
        option
        for parameter in inner.params
        for option in (*parameter.opts, *getattr(parameter, "secondary_opts", ()))
    }
    known |= {"--help", "-h"}
    for word in words:
        option = re.match(r"\[?(--?[A-Za-z][\w-]*)", word)
        if option and option[1] not in known:
            return f"no option {option[1]}"
    return None


def _pieces(quote: str) -> list[str]:
    """Return the words of a quoted message between what is left out."""
    text = " ".join(line.removeprefix(">").strip() for line in quote.splitlines())
    text = _FILLED_IN.sub(_LEFT_OUT, text).replace("\\", "")
    pieces = [" ".join(piece.split()).strip() for piece in text.split(_LEFT_OUT)]
    return [piece for piece in pieces if sum(map(str.isalpha, piece)) >= _FEWEST_LETTERS]


@cache
def _texts() -> tuple[str, ...]:
    """Return every string of the code, with a mark for each value that is put in."""
    found = []
    for module in MODULES:
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    str(part.value) if isinstance(part, ast.Constant) else _LEFT_OUT
                    for part in node.values
                ]
                found.append(" ".join("".join(parts).split()))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(" ".join(node.value.split()))
    return tuple(found)
