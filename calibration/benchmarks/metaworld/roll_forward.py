"""Roll-forward in the simulator: what will be seen when a thought is over, things included.

`CommandResponse` says where the hand will be; what it takes along is known here only.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.object_state import (
    BEFORE,
    FIRST,
    GRIPPER,
    HAND,
    SECOND,
)
from qvla_export.shared.motion.command_response import CommandResponse

# An action of 1 is 20 mm. Shares are means over three axes of a fit to 18 episodes, 1.4 to 2.7 mm
# RMS a step off: what is commanded comes 1.6 steps later on average, and table and workspace keep
# a ninth of it from coming at all.
_HAND = CommandResponse(np.full(3, 0.02), np.array([0.17, 0.275, 0.225, 0.13, 0.07, 0.015]))
# A thing moves along with the hand where their last movements differ by no more than this share,
# and the hand moved further than this, metres in a simulator step. What is gripped swings.
_ALONG = 0.8
_MOVES_M = 0.0005
# A hand that stands still holds what is this near, metres, once the gripper has come to rest less
# open than this.
_GRIPPED_M, _OPEN, _AT_REST = 0.05, 0.9, 0.002
# Simulator steps in a control step, and how much of its present speed a gripper keeps up.
_REPEAT, _KEPT = 2, 0.7


@dataclass(frozen=True)
class Ahead:
    """What will happen before a chunk begins."""

    # Of the hand, metres.  float64 [3]
    hand: NDArray[np.float64]
    # Control steps.
    steps: int


def hand_ahead(
    sent: Sequence[NDArray[np.float32]], committed: Sequence[NDArray[np.float32]]
) -> Ahead:
    """Return how far the hand will have moved when all commands are sent.

    Args:
        sent: the commands until now, of which the last are still being followed.  [4] each
        committed: the commands that follow.  [4] each
    """
    # The simulator cuts what is longer than 1.
    followed = [np.clip(action, -1.0, 1.0) for action in sent[-_HAND.memory :]]
    following = [np.clip(action, -1.0, 1.0) for action in committed]
    return Ahead(_HAND.moved(followed, following), len(committed))


def roll_forward(full_state: NDArray[np.float64], ahead: Ahead) -> NDArray[np.float64]:
    """Return a full state some control steps later.

    The hand has moved, and with it what it holds or what has just moved along with it; the gripper
    has gone on opening or closing.

    Args:
        full_state: float64 [39].
        ahead: what will have happened.
    """
    rolled = full_state.copy()
    rolled[HAND] += ahead.hand
    closing = full_state[GRIPPER] - full_state[GRIPPER + BEFORE]
    opening = full_state[GRIPPER] + _KEPT * _REPEAT * ahead.steps * closing
    rolled[GRIPPER] = np.clip(opening, 0.0, 1.0)
    hand = _last_step(full_state, HAND)
    distance = np.linalg.norm(hand)
    gripped = full_state[GRIPPER] < _OPEN and abs(closing) < _AT_REST
    for thing in (FIRST, SECOND):
        if distance > _MOVES_M:
            apart = np.linalg.norm(_last_step(full_state, thing) - hand)
            along = apart <= _ALONG * distance
        else:
            near = np.linalg.norm(full_state[thing] - full_state[HAND]) < _GRIPPED_M
            along = gripped and near
        if along:
            rolled[thing] += ahead.hand
    return rolled


def _last_step(full_state: NDArray[np.float64], place: slice) -> NDArray[np.float64]:
    before = slice(place.start + BEFORE, place.stop + BEFORE)
    return full_state[place] - full_state[before]
