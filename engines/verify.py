"""How far an engine's actions are from reference actions on the same observations."""

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.base import Engine, EngineError
from qvla_export.bundle import Bundle

# An engine that computes what torch computes stays far below this, in units where the range of an
# action is 2.
MAX_DRIFT = 1e-3
_LOGGER = logging.getLogger(__name__)


class VerificationError(EngineError):
    """An engine does not reproduce its bundle's reference actions."""


@dataclass(frozen=True)
class ActionDrift:
    """Difference of two policies' actions on the same observations, by action dimension."""

    # Cosine between all actions as one vector; 1 is equal.
    cosine: float
    # Largest and mean |difference|, normalized (the range is 2).  float64 [dim]
    max_normalized: NDArray[np.float64]
    mean_normalized: NDArray[np.float64]
    # The same in the robot's units.  float64 [dim]
    max_physical: NDArray[np.float64]
    mean_physical: NDArray[np.float64]
    # Observations compared.
    observations: int

    @property
    def worst(self) -> float:
        """Largest normalized |difference| of any dimension."""
        return float(self.max_normalized.max())

    def to_json(self) -> dict[str, object]:
        """Return what a report stores."""
        return {
            "cosine": self.cosine,
            "observations": self.observations,
            "max_normalized": self.max_normalized.tolist(),
            "mean_normalized": self.mean_normalized.tolist(),
            "max_physical": self.max_physical.tolist(),
            "mean_physical": self.mean_physical.tolist(),
        }


def action_drift(
    reference: NDArray[np.float32], candidate: NDArray[np.float32], unit: NDArray[np.float64]
) -> ActionDrift:
    """Compare normalized actions.

    Args:
        reference, candidate: float32 [observations, horizon, dim].
        unit: physical size of one normalized unit, `Bounds.scale()`.  float64 [dim]

    Raises:
        EngineError: the shapes differ or an action is not finite.
    """
    if reference.shape != candidate.shape or reference.ndim != 3 or not len(reference):
        raise EngineError(
            f"actions to compare must both be [n, horizon, dim] with n > 0, "
            f"got {list(reference.shape)} and {list(candidate.shape)}"
        )
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise EngineError("actions to compare must be finite, got NaN or infinity")
    difference = np.abs(a - b)
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    largest, mean = difference.max(axis=(0, 1)), difference.mean(axis=(0, 1))
    return ActionDrift(
        cosine=float((a * b).sum()) / length if length else float(np.array_equal(a, b)),
        max_normalized=largest,
        mean_normalized=mean,
        max_physical=largest * unit,
        mean_physical=mean * unit,
        observations=len(a),
    )


def compare_golden(bundle: Bundle, engine: Engine) -> ActionDrift:
    """Return an engine's drift from torch on the bundle's golden observations."""
    golden = bundle.golden()
    actions = np.concatenate([engine.infer(feeds)["actions"] for feeds in golden.feeds])
    return action_drift(golden.reference, actions, bundle.processor.statistics.action.scale())


def verify(bundle: Bundle, engine: Engine, max_drift: float = MAX_DRIFT) -> ActionDrift:
    """Return the drift on the golden observations, or refuse the engine.

    Raises:
        VerificationError: the largest normalized |difference| exceeds `max_drift`.
    """
    drift = compare_golden(bundle, engine)
    if drift.worst > max_drift:
        raise VerificationError(
            f"the engine differs from torch by {drift.worst:.2e} (normalized action) on "
            f"{drift.observations} golden observations, allowed are {max_drift:.0e}; "
            "use the runtime version the bundle was made with"
        )
    _LOGGER.info("verified: max |difference| %.1e, cosine %.7f", drift.worst, drift.cosine)
    return drift
