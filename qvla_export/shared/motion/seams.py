"""Seams: where the commands of one chunk follow those of another."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def steps_of(gap: NDArray[Any], limit: NDArray[Any]) -> int:
    """Return in how many steps a fade changes no number by more than its limit.

    Args:
        gap: what is to be faded over.  [n]
        limit: largest change in a step, above 0; infinity for any.  [n]
    """
    return int(np.ceil(np.max(np.abs(gap) / limit, initial=0.0)))


def faded(actions: NDArray[np.float32], gap: NDArray[Any], steps: int) -> NDArray[np.float32]:
    """Return actions that begin near the commands before them and become themselves.

    The fade adds as much to every change as to the first; what the robot is then short of, the next
    look sees.

    Args:
        actions: float32 [length, n].
        gap: the last command less the first action.  [n]
        steps: from the last command to the actions as they are.

    Returns:
        float32 [length, n]
    """
    left = 1.0 - np.arange(1, len(actions) + 1) / max(steps, 1)
    blended: NDArray[np.float32] = actions + np.maximum(left, 0.0)[:, None] * gap
    return blended.astype(np.float32)
