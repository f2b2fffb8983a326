"""Between a policy and a robot: actions far outside the demonstrations go no further.

An evaluation in a simulator does without it: there, an absurd action is what is to be counted.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jetson.policy import UnsafeAction
from jetson.serving.policy_contract import processor_of
from qvla_export.shared.action import ActionChunk, ActionPolicy
from qvla_export.shared.observation import Observation

# Largest normalized value that is acted on: policies learn from values cut to 1.
MOST_NORMALIZED = 3.0


@dataclass(frozen=True)
class GuardedPolicy:
    """A policy whose actions are near its limits, or refused; an `ActionPolicy`."""

    policy: ActionPolicy
    # Dimensions that have limits.  bool [dim]
    mask: NDArray[np.bool_]

    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation.

        Raises:
            UnsafeAction: an action is far outside the limits; nothing is returned to act on.
        """
        chunk = self.policy.infer(observation)
        normalized = np.asarray(chunk.normalized)
        # What has another shape is refused by whoever knows the right one.
        if normalized.ndim == 2 and normalized.shape[1] == self.mask.size:
            far = self.mask & (np.abs(normalized) > MOST_NORMALIZED)
            if far.any():
                raise UnsafeAction(_reason(normalized, far))
        return chunk


def guarded(policy: ActionPolicy) -> ActionPolicy:
    """Return a policy behind its guard; itself where nothing says what its limits are."""
    processor = processor_of(policy)
    if processor is None:
        return policy
    return GuardedPolicy(policy, processor.statistics.action.mask)


def _reason(normalized: NDArray[np.float32], far: NDArray[np.bool_]) -> str:
    step, dimension = np.argwhere(far)[0].tolist()
    return (
        f"the policy put out {normalized[step, dimension]:.3g} at [step, dimension] "
        f"{[step, dimension]}, where 1 is the limit of the demonstrations and "
        f"{MOST_NORMALIZED:g} the most that is acted on; no action was taken. Run qvla verify on "
        "this bundle"
    )
