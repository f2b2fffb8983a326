"""Between a policy and a robot: actions far outside the demonstrations go no further.

An evaluation in a simulator does without it: there, an absurd action is what is to be counted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jetson.policy import UnsafeAction
from jetson.serving.policy_contract import processor_of
from qvla_export.shared.action import ActionChunk, ActionPolicy
from qvla_export.shared.normalization import Bounds
from qvla_export.shared.observation import Observation

# Farthest place from the middle of the limits, in halves of their range, that is acted on.
MOST_NORMALIZED = 3.0


@dataclass(frozen=True)
class GuardedPolicy:
    """A policy whose actions are near its limits, or refused; an `ActionPolicy`."""

    policy: ActionPolicy
    # Of its actions.
    limits: Bounds

    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation.

        Raises:
            UnsafeAction: an action is far outside the limits; nothing is returned to act on.
        """
        chunk = self.policy.infer(observation)
        normalized, mask = np.asarray(chunk.normalized), self.limits.mask
        # What has another shape is refused by whoever knows the right one.
        if normalized.ndim == 2 and normalized.shape[1] == mask.size:
            places = self.limits.places(normalized)
            far = mask & (np.abs(places) > MOST_NORMALIZED)
            if far.any():
                raise UnsafeAction(_reason(places, far))
        return chunk


def guarded(policy: ActionPolicy) -> ActionPolicy:
    """Return a policy behind its guard; itself where nothing says what its limits are."""
    processor = processor_of(policy)
    if processor is None:
        return policy
    return GuardedPolicy(policy, processor.statistics.action)


def _reason(places: NDArray[np.float64], far: NDArray[np.bool_]) -> str:
    step, dimension = np.argwhere(far)[0].tolist()
    return (
        f"the policy put out {places[step, dimension]:.3g} at [step, dimension] "
        f"{[step, dimension]}, where 1 is the limit of the demonstrations and "
        f"{MOST_NORMALIZED:g} the most that is acted on; no action was taken. Run qvla verify on "
        "this bundle"
    )
