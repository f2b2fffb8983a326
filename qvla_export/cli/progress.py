"""What commands show: how far a call is, on stderr, and what came of it: texts, or JSON.

Bars on a terminal, elsewhere plain lines that a log keeps.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import typer

from qvla_export.pipeline.progress import OnProgress, Progress, ignore
from qvla_export.shared.tables.text_table import TextTable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

# Of tables wherever nobody looks at a terminal.
NARROW, WIDE, WIDEST = 100, 120, 132
# A log hears of the same work again after so many seconds.
_REPEAT_S = 30.0


def print_json(document: object) -> None:
    """Print a document on stdout."""
    typer.echo(json.dumps(document, indent=1))


class Result(Protocol):
    """What came of a command, as `--json` prints it."""

    def to_json(self) -> Mapping[str, Any]:
        """Return the document."""
        ...


def print_result(
    result: Result, texts: Iterable[str | TextTable], as_json: bool, width: int | None = None
) -> None:
    """Print what came of a command: its document with `--json`, else its texts."""
    if as_json:
        print_json(result.to_json())
    else:
        print_texts(texts, width)


def print_texts(texts: Iterable[str | TextTable], width: int | None = None) -> None:
    """Print lines and tables on stdout; tables as wide as the terminal, or as said."""
    for text in texts:
        if isinstance(text, TextTable):
            _print_table(text, width)
        else:
            typer.echo(text)


def _print_table(table: TextTable, width: int | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    drawn, left = Table(title=escape(table.title) or None), (table.columns[0], *table.words)
    for column in table.columns:
        drawn.add_column(
            Text(column), justify="left" if column in left else "right", overflow="fold"
        )
    for row in table.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    Console(width=width).print(drawn)


@contextmanager
def progress_shown(console: "Console | None" = None, silent: bool = False) -> Iterator[OnProgress]:
    """Yield a listener that draws on stderr until the block ends; `silent` draws nothing."""
    if silent:
        yield ignore
        return
    from rich.console import Console

    where = console or Console(stderr=True, highlight=False, soft_wrap=True)
    if not where.is_terminal:
        yield _Lines(where.print).hear
        return
    import rich.progress as bars

    columns = (
        bars.TextColumn("{task.description}", markup=False),
        bars.BarColumn(),
        bars.TaskProgressColumn(),
        bars.TimeRemainingColumn(elapsed_when_finished=True),
    )
    with bars.Progress(*columns, console=where) as drawn:
        yield _Bars(drawn).hear


class _Bars:
    """One bar for each step, or piece of work in a call without steps."""

    def __init__(self, drawn: "Bars") -> None:
        self._drawn = drawn
        self._tasks: dict[str, TaskID] = {}

    def hear(self, progress: Progress) -> None:
        text = _text(progress)
        if text not in self._tasks:
            # A total of None draws a bar that moves without saying how far it is.
            self._tasks[text] = self._drawn.add_task(text, total=progress.total or None)
        task = self._tasks[text]
        if progress.state != "running":
            done = progress.total or 1
            kept = " (kept)" if progress.state == "kept" else ""
            self._drawn.update(task, description=text + kept, completed=done, total=done)
        elif progress.total:
            said = f"{text}: {progress.detail}" if progress.detail else text
            self._drawn.update(
                task, description=said, completed=progress.done, total=progress.total
            )


@dataclass
class _Work:
    """Work that runs: when it began, when a line was last said."""

    began: float
    last: float
    # Of the units that are counted: what they are, when and at how many they began.
    detail: str
    counting: float
    first: int


class _Lines:
    """A line when work begins, ends or has gone on for long, with an estimate of the time left."""

    def __init__(
        self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._say, self._clock = say, clock
        # By its text: several may run side by side.
        self._works: dict[str, _Work] = {}

    def hear(self, progress: Progress) -> None:
        now, text = self._clock(), _text(progress)
        if text not in self._works:
            self._works[text] = _Work(now, now, progress.detail, now, progress.done)
            if progress.state == "running":
                self._say(text)
        work = self._works[text]
        if progress.detail != work.detail:
            work.detail, work.counting, work.first = progress.detail, now, progress.done
        if progress.state != "running":
            self._say(f"{text}: {progress.state}, {now - work.began:.0f} s")
            del self._works[text]
        elif now - work.last >= _REPEAT_S and progress.total:
            work.last = now
            part = f": {progress.detail}" if progress.detail else ""
            count = f"{progress.done} of {progress.total}"
            self._say(f"{text}{part}: {count}{self._left(work, progress, now)}")

    @staticmethod
    def _left(work: _Work, progress: Progress, now: float) -> str:
        units = progress.done - work.first
        if units <= 0:
            return ""
        left_s = (now - work.counting) / units * (progress.total - progress.done)
        return (
            f", about {left_s:.0f} s left"
            if left_s < 120
            else f", about {left_s / 60:.0f} min left"
        )


def _text(progress: Progress) -> str:
    if not progress.steps:
        return progress.work
    return f"step {progress.step} of {progress.steps}: {progress.work}"
