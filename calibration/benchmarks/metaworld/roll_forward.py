"""Roll-forward: what will be seen when a thought is over, from the commands sent until then.

As VLASH (arXiv 2512.01031) does with proprioception: a policy that is shown the state at which its
chunk will begin plans from there.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.object_state import BEFORE, FIRST, HAND, SECOND

# Length of an action of 1, metres.
_UNIT_M = 0.02
# Shares of a commanded step that the hand makes in this control step, the next, and so on: a fit
# to 18 episodes, 1.4 mm RMS a step off. What is commanded comes 1.6 steps later on average.
_RESPONSE = np.array([0.174, 0.300, 0.230, 0.145, 0.095, 0.040, 0.016])
_MADE = np.append(0.0, np.cumsum(_RESPONSE) / _RESPONSE.sum())
# A thing moves along with the hand where their last movements differ by no more than this share,
# and the hand moved further than this, metres in a simulator step.
_ALONG = 0.35
_MOVES_M = 0.0005


def hand_ahead(
    sent: Sequence[NDArray[np.float32]], committed: Sequence[NDArray[np.float32]]
) -> NDArray[np.float64]:
    """Return how far the hand will have moved when all commands are sent, metres.  float64 [3]

    Args:
        sent: the commands until now, of which the last are still being followed.  [4] each
        committed: the commands that follow.  [4] each
    """
    ahead = np.zeros(3)
    for age, action in enumerate(reversed(committed)):
        ahead += _made(age + 1) * np.clip(action[:3], -1.0, 1.0)
    for age, action in enumerate(reversed(sent[-len(_RESPONSE) :])):
        share = _made(age + 1 + len(committed)) - _made(age + 1)
        ahead += share * np.clip(action[:3], -1.0, 1.0)
    return ahead * _UNIT_M


def roll_forward(
    full_state: NDArray[np.float64], ahead: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return a full state with the hand moved, and with it what has just moved along with it.

    Args:
        full_state: float64 [39].
        ahead: of the hand, metres.  float64 [3]
    """
    rolled = full_state.copy()
    rolled[HAND] += ahead
    step = _last_step(full_state, HAND)
    distance = np.linalg.norm(step)
    for thing in (FIRST, SECOND):
        apart = np.linalg.norm(_last_step(full_state, thing) - step)
        if distance > _MOVES_M and apart <= _ALONG * distance:
            rolled[thing] += ahead
    return rolled


def _made(steps: int) -> float:
    """Share of a commanded step that is made after so many control steps."""
    return float(_MADE[min(steps, len(_RESPONSE))])


def _last_step(full_state: NDArray[np.float64], place: slice) -> NDArray[np.float64]:
    before = slice(place.start + BEFORE, place.stop + BEFORE)
    return full_state[place] - full_state[before]
