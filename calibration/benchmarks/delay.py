"""What a robot does while its policy thinks: the plan it has, then nothing."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class Step:
    """One control step's command."""

    # float32 [4]
    action: Vector
    # Number of the chunk it is of, from 1; a robot that waits goes on with the last one's.
    chunk: int


class CommandQueue:
    """The commands between one look and the next, where a chunk comes `delay` steps after its look.

    Slots of a chunk are moments: what was planned for the steps that thinking took is left out.
    Until then the last chunk's later slots are executed; where it has no more, the arm holds still
    with the gripper as it is. Without a delay a chunk's first `execute` actions are executed.
    """

    def __init__(self, execute: int, delay: int) -> None:
        self._execute = execute
        self._delay = delay
        self._left: Sequence[Vector] = ()
        self._chunks = 0
        self._gripper = np.float32(0.0)

    def steps(self, chunk: NDArray[np.float32]) -> list[Step]:
        """Return the commands until the next look, given the chunk of this one.  [horizon, 4]"""
        # Slots after the thinking last until the next chunk is there; the policy, which thinks
        # one thought at a time, never looks again before this one.
        spare = max(len(chunk) - self._delay, 1)
        length = max(min(self._execute, spare), self._delay)
        late = [Step(self._late(step), self._chunks) for step in range(self._delay)]
        self._chunks += 1
        fresh = [Step(action, self._chunks) for action in chunk[self._delay : length]]
        self._left = list(chunk[length:])
        steps = [*late, *fresh]
        self._gripper = steps[-1].action[3]
        return steps

    def _late(self, step: int) -> Vector:
        if step < len(self._left):
            self._gripper = self._left[step][3]
            return self._left[step]
        return np.array([0.0, 0.0, 0.0, self._gripper], np.float32)
