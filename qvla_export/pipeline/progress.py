"""What a running call says of itself: to a terminal, a notebook or a log.

Pipeline calls take an `OnProgress` and print nothing; `qvla_export.cli.progress` draws it.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

State = Literal["running", "made", "kept"]


@dataclass(frozen=True)
class Progress:
    """One message of a running call."""

    # What is being done: "moments, blocks of 4096".
    work: str
    # Units of the work that are done, and all; 0 of 0 where it has none.
    done: int = 0
    total: int = 0
    # Which step of how many this is or belongs to; 0 of 0 in a call that is one step.
    step: int = 0
    steps: int = 0
    # "kept": an artifact of an earlier call is up to date and nothing was to be done.
    state: State = "running"
    # Inside a numbered step: which part of its work `done` and `total` count.
    detail: str = ""


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Take no notice; what a call does where nobody asked to be told."""


def bar(on_progress: OnProgress, work: str) -> Callable[[int, int], None]:
    """Return a callback `(units done, units in all)` that reports one piece of work."""
    return lambda done, total: on_progress(Progress(work, done, total))


def finish(on_progress: OnProgress, work: str, kept: bool) -> None:
    """Report the end of one piece of work, and whether an artifact was kept or made."""
    on_progress(Progress(work, state="kept" if kept else "made"))


class NumberedSteps:
    """The steps of a long call, numbered for whoever listens."""

    def __init__(self, on_progress: OnProgress, steps: int) -> None:
        self._on_progress = on_progress
        self._steps = steps
        # Of the step that runs; 0 before the first.
        self._step = 0

    @contextmanager
    def next(self, work: str) -> Iterator[OnProgress]:
        """Yield the listener of the next step; say when it begins and ends.

        A step was "kept" if all that it called was.
        """
        self._step += 1
        whole = Progress(work, step=self._step, steps=self._steps)
        ends: list[State] = []

        def hear(part: Progress) -> None:
            if part.state != "running":
                ends.append(part.state)
            else:
                counted = replace(whole, done=part.done, total=part.total, detail=part.work)
                self._on_progress(counted)

        self._on_progress(whole)
        yield hear
        kept = bool(ends) and set(ends) == {"kept"}
        self._on_progress(replace(whole, state="kept" if kept else "made"))
