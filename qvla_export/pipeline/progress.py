"""What a running call says of itself: to a terminal, a notebook or a log.

Pipeline calls take an `OnProgress` and print nothing; `qvla_export.cli.progress` draws it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Progress:
    """One message of a running call."""

    # What is being done: "moments, blocks of 4096".
    work: str
    # Units of the work that are done, and all; 0 of 0 where it has none.
    done: int = 0
    total: int = 0
    # Which step of how many this belongs to; 0 of 0 in a call that is one step.
    step: int = 0
    steps: int = 0
    # "kept": an artifact of an earlier call is up to date and nothing was to be done.
    state: Literal["running", "made", "kept"] = "running"


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Take no notice; what a call does where nobody asked to be told."""


def bar(on_progress: OnProgress, work: str) -> Callable[[int, int], None]:
    """Return a callback `(units done, units in all)` that reports one piece of work."""
    return lambda done, total: on_progress(Progress(work, done, total))


@dataclass(frozen=True)
class Steps:
    """The steps of a call, numbered for whoever listens."""

    on_progress: OnProgress
    steps: int
    # Of the step that runs; 0 before the first.
    step: int = 0

    def next(self, work: str) -> "Steps":
        """Begin the next step; its `on_progress` numbers what the step reports."""
        begun = replace(self, step=self.step + 1)
        begun.tell(Progress(work))
        return begun

    def tell(self, progress: Progress) -> None:
        """Report on the step that runs."""
        self.on_progress(replace(progress, step=self.step, steps=self.steps))
