"""What simulators count and refuse alike: how far an episode is, what an action may be."""

import math
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.shifts import Shift
from qvla_export.shared.errors import QvlaError


class LimitedTask(Protocol):
    """A task whose episodes have a limit."""

    @property
    def name(self) -> str:
        """What it is called."""
        ...

    @property
    def steps(self) -> int:
        """Episode limit, control steps."""
        ...


TaskT = TypeVar("TaskT", bound=LimitedTask)


class EpisodeProgress(Generic[TaskT]):
    """How far an episode of a task is: what every simulator of an episode begins with."""

    def __init__(self, task: TaskT) -> None:
        self.task = task
        # Control steps since the last reset.
        self.steps = 0
        # Whether the task was solved at any moment since the last reset.
        self.success = False

    @property
    def goal_distance_m(self) -> float:
        """From the thing to where it goes; infinite where that is not one place."""
        return math.inf

    @property
    def done(self) -> bool:
        """Whether the episode is solved or out of steps."""
        return self.success or self.steps >= self.task.steps

    def _begin(self) -> None:
        self.steps, self.success = 0, False

    def _count_step(self, solved: bool) -> bool:
        """Count a control step that was taken; return whether the task has been solved by now."""
        self.steps += 1
        self.success = self.success or solved
        return self.success

    def _refuse_changes(self, instruction: str | None, shift: Shift | None) -> None:
        """Refuse what is changed of an episode by a simulator that runs it as it is.

        Raises:
            QvlaError: another instruction or a shift is asked for.
        """
        if instruction is not None or shift is not None:
            raise QvlaError(f"{self.task.name} is run as it is: without shift and controls")


def require_action(action: NDArray[np.float32], dimensions: int) -> None:
    """Refuse what is not one finite action of so many numbers.

    Raises:
        QvlaError: it is not.
    """
    if action.shape != (dimensions,) or not np.isfinite(action).all():
        raise QvlaError(f"an action is {dimensions} finite numbers, got {action.tolist()!s:.200}")
