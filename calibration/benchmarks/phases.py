"""Phases of a task, from what the gripper was told and how near a thing is to its goal."""

from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Phase = Literal["approach", "grasp", "carry", "insert", "place"]
# In the order of a task.
PHASES: Final[tuple[Phase, ...]] = ("approach", "grasp", "carry", "insert", "place")

# Control steps in which a gripper that was told to close is taken to be closing, and how near its
# goal a thing is being inserted, or put down, metres.
_GRASP_STEPS, _NEAR_M = 12, 0.08


def phase_of(closing: NDArray[np.bool_], goal_distance_m: float) -> Phase:
    """Return the phase of a decision.

    Args:
        closing: whether each command until now told the gripper to close.  bool [n]
        goal_distance_m: from what is moved to its goal; infinite where a task has none.
    """
    if not closing.any():
        return "approach"
    if not closing[-1]:
        return "place"
    opened = np.flatnonzero(~closing)
    since = len(closing) - (opened[-1] + 1 if len(opened) else 0)
    if since <= _GRASP_STEPS:
        return "grasp"
    return "insert" if goal_distance_m <= _NEAR_M else "carry"
