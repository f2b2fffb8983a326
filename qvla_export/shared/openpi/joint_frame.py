"""The noun `JointFrame`: how a robot's joints stand to those that a policy counts.

openpi's base policies were trained on arms whose shoulders and elbows turn the other way than an
ALOHA's, and whose grippers are angles of a servo. ALOHA's software has openings instead, 0 to 1: of
a finger's way where a gripper is read, of another range of angles where it is told (`adapt_to_pi`).
And actions may be differences to the state (`use_delta_joint_actions`, `extra_delta_transform`).

Source: openpi `policies/aloha_policy.py`, `transforms.py`, commit 15a9616.
"""

from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import ArtifactError, InvalidObservation
from qvla_export.shared.normalization import Affine

# Numbers of an ALOHA's state and action: six joints and a gripper, left and right.
ALOHA_DIMENSIONS: Final = 14
_GRIPPERS = [6, 13]
# 1 and -1: which way each number counts.  float64 [14]
_TURNS: Final = np.tile([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0], 2)

# Metres of a finger's way at openings of 0 and 1, and the two arms of the crank that moves it.
_FINGER_M, _FINGER_OPEN_M = 0.01844, 0.05800
_ROD_M, _CRANK_M = 0.036, 0.022
# Radians of the servo: at 0 and 1 of what the policies read, and of what the robot is told.
_READ_RAD, _READ_OPEN_RAD = 0.5476, 1.6296
_TOLD_RAD, _TOLD_OPEN_RAD = -0.6213, 1.4910


@dataclass(frozen=True)
class JointFrame:
    """Whose joints a policy counts; as it is made, those of its robot."""

    # Whether the robot is an ALOHA and the policy counts as openpi's base policies do.
    aloha: bool = False
    # Numbers of an action that are differences to the same numbers of the state.
    relative: tuple[int, ...] = ()

    def require_fits(self, action_dim: int, state_dim: int) -> None:
        """Refuse a frame that actions and states of such sizes cannot have.

        Raises:
            ArtifactError: they are no ALOHA's, or a number is relative to none.
        """
        if type(self.aloha) is not bool:
            raise ArtifactError(f"adapt_to_pi must be true or false, got {self.aloha!r:.80}")
        if self.aloha and (action_dim, state_dim) != (ALOHA_DIMENSIONS, ALOHA_DIMENSIONS):
            raise ArtifactError(
                f"adapt_to_pi is of an ALOHA, whose actions and states have {ALOHA_DIMENSIONS} "
                f"numbers, the policy's have {action_dim} and {state_dim}; write false"
            )
        numbers, most = self.relative, min(action_dim, state_dim)
        whole = isinstance(numbers, tuple) and all(
            type(number) is int and 0 <= number < most for number in numbers
        )
        if not whole or len(set(numbers)) != len(numbers):
            raise ArtifactError(
                "relative_actions must be a list of different whole numbers from 0 to "
                f"{most - 1}, which state and action both have, got {numbers!r:.120}"
            )
        if self.aloha and (odd := sorted({*numbers} & {*_GRIPPERS})):
            raise ArtifactError(
                f"relative_actions holds {odd}, an ALOHA's grippers, which are read in other units "
                "than they are told; openpi's configurations leave them absolute"
            )

    def turns(self) -> NDArray[np.float64] | float:
        """Return which way each number of an action counts, 1 or -1."""
        return _TURNS if self.aloha else 1.0

    def policy_state(self, state: NDArray[Any]) -> NDArray[Any]:
        """Return a robot's state as the policy counts it.  [n]"""
        if not self.aloha:
            return state
        counted: NDArray[np.float64] = _TURNS * np.asarray(state, np.float64)
        way = _FINGER_M + counted[_GRIPPERS] * (_FINGER_OPEN_M - _FINGER_M)
        with np.errstate(divide="ignore"):  # no way at all: the sine is cut to an end
            sine = (_CRANK_M**2 + way**2 - _ROD_M**2) / (2 * _CRANK_M * way)
        angle = np.arcsin(np.clip(sine, -1.0, 1.0))
        counted[_GRIPPERS] = (angle - _READ_RAD) / (_READ_OPEN_RAD - _READ_RAD)
        return counted

    def robot_limits(self, actions: Affine) -> Affine:
        """Return the map to the robot's actions of one to the policy's, its limits included."""
        if not self.aloha:
            return actions
        size, offset = _TURNS.copy(), np.zeros(ALOHA_DIMENSIONS)
        size[_GRIPPERS] = 1 / (_TOLD_OPEN_RAD - _TOLD_RAD)
        offset[_GRIPPERS] = (_READ_RAD - _TOLD_RAD) * size[_GRIPPERS]
        limits = [limit * size + offset for limit in (actions.low, actions.high)]
        low, high = np.sort(limits, axis=0)
        return replace(
            actions,
            low=low,
            high=high,
            center=actions.center * size + offset,
            divisor=actions.divisor * size,
            factor=actions.factor * size,
        )

    def absolute(
        self, actions: NDArray[np.float64], state: NDArray[Any] | None
    ) -> NDArray[np.float64]:
        """Return a robot's actions with what they are relative to.  [..., dim]

        Args:
            actions: what `robot_limits` un-normalized.
            state: the robot's, when it was observed; unread where nothing is relative.

        Raises:
            InvalidObservation: something is, and the state is missing or too short.
        """
        if not self.relative:
            return actions
        size = 0 if state is None else len(state)
        if state is None or size <= max(self.relative):
            raise InvalidObservation(
                "the policy's actions are differences to the state, which must have at least "
                f"{max(self.relative) + 1} numbers, got {size}"
            )
        numbers, whole = list(self.relative), actions.copy()
        # Turned twice, once to the policy's count and once back.
        whole[..., numbers] += state[numbers]
        return whole


# Of a policy that counts as its robot does.
ROBOT_JOINTS: Final = JointFrame()
