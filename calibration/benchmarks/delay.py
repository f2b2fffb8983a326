"""What a robot does while its policy thinks: the plan it has, then nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.motion.seams import faded, steps_of

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """One control step's command."""

    # float32 [4]
    action: Vector
    # Number of the chunk it is of, from 1; a robot that waits goes on with the last one's.
    chunk: int


class CommandQueue:
    """The commands between one look and the next, where a chunk comes some steps after its look.

    Slots of a chunk are moments. Without roll-forward its first slot is the moment of the look,
    and what was planned for the steps that thinking took is left out; with it, the first slot is
    a moment ahead that was foreseen. Until then the last chunk's later slots are executed; where
    it has no more, the arm holds still with the gripper as it is. Without a delay a chunk's first
    `execute` actions are executed.

    With a limit, the hand's commanded step changes by at most that much where a new chunk begins:
    it fades from the old chunk's to the new one's in as few steps as that takes. What the hand is
    then short of, the next look sees.
    """

    def __init__(self, execute: int, seam_limit: float = 0.0) -> None:
        """Begin an episode, at rest.

        Args:
            execute: actions of a chunk executed before the next look.
            seam_limit: largest change of the hand's step at a seam, in units of an action; 0 for
                none.
        """
        self._execute = execute
        self._limit = seam_limit
        self._left: Sequence[Vector] = ()
        self._chunks = 0
        self._last = np.zeros(4, np.float32)

    def committed(self, count: int) -> list[Vector]:
        """Return the next commands, should no chunk come before them."""
        gripper = self._left[-1][3] if len(self._left) else self._last[3]
        still = np.array([0.0, 0.0, 0.0, gripper], np.float32)
        return [*self._left[:count], *[still] * (count - len(self._left))]

    def steps(self, chunk: NDArray[np.float32], delay: int, foreseen: int = 0) -> list[Step]:
        """Return the commands until the next look, given the chunk of this one.

        Args:
            chunk: float32 [horizon, 4].
            delay: steps that pass between the look and the chunk.
            foreseen: how many steps after the look the chunk's first slot is.
        """
        wait = max(delay, foreseen)
        # What is left after the next look lasts until the chunk of that is there; the policy,
        # which thinks one thought at a time, never looks again before this one.
        spare = max(foreseen + len(chunk) - delay, 1)
        length = max(min(self._execute, spare), wait)
        late = [Step(action, self._chunks) for action in self.committed(wait)]
        self._chunks += 1
        begin, end = wait - foreseen, max(length - foreseen, wait - foreseen)
        before = late[-1].action if late else self._last
        blended = self._blend(chunk[begin:], before)
        fresh = [Step(action, self._chunks) for action in blended[: end - begin]]
        self._left = blended[end - begin :]
        steps = [*late, *fresh]
        self._last = steps[-1].action
        return steps

    def _blend(self, actions: NDArray[np.float32], before: Vector) -> list[Vector]:
        if not self._limit or not len(actions):
            return list(actions)
        gap = before - actions[0]
        gap[3] = 0.0
        # Of the hand's step as a whole, not of each axis.
        length = np.linalg.norm(gap[None], axis=1)
        return list(faded(actions, gap, steps_of(length, np.array([self._limit]))))
