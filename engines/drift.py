"""The noun `ActionDrift`: how far two policies' actions lie apart on the same observations."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.base import EngineError


@dataclass(frozen=True)
class ActionDrift:
    """Difference of two policies' actions on the same observations, by action dimension."""

    # Cosine between all actions as one vector; 1 is equal.
    cosine: float
    # Largest, mean and root mean square |difference|, normalized (the range is 2).  float64 [dim]
    max_normalized: NDArray[np.float64]
    mean_normalized: NDArray[np.float64]
    rms_normalized: NDArray[np.float64]
    # Largest and mean |difference| in the robot's units.  float64 [dim]
    max_physical: NDArray[np.float64]
    mean_physical: NDArray[np.float64]
    # Share of actions in another bin; None where actions are continuous.  float64 [dim]
    flipped: NDArray[np.float64] | None
    # Median over observations of each one's root mean square difference, normalized.
    median_rms: float
    # Observations compared, and actions of one dimension: observations times horizon.
    observations: int
    actions: int

    @property
    def worst(self) -> float:
        """Largest normalized |difference| of any dimension."""
        return float(self.max_normalized.max())

    @property
    def rms(self) -> float:
        """Root mean square normalized difference over all dimensions."""
        return float(np.sqrt(np.square(self.rms_normalized).mean()))

    def to_json(self) -> dict[str, object]:
        """Return what a report stores."""
        return {
            "cosine": self.cosine,
            "observations": self.observations,
            "rms": self.rms,
            "median_rms": self.median_rms,
            "max_normalized": self.max_normalized.tolist(),
            "mean_normalized": self.mean_normalized.tolist(),
            "rms_normalized": self.rms_normalized.tolist(),
            "max_physical": self.max_physical.tolist(),
            "mean_physical": self.mean_physical.tolist(),
            "flipped": None if self.flipped is None else self.flipped.tolist(),
        }


def action_drift(
    reference: NDArray[np.float32],
    candidate: NDArray[np.float32],
    unit: NDArray[np.float64],
    bins: int = 0,
) -> ActionDrift:
    """Compare normalized actions.

    Args:
        reference, candidate: float32 [observations, horizon, dim].
        unit: physical size of one normalized unit, `Bounds.scale()`.  float64 [dim]
        bins: bins over [-1, 1] that actions are the centres of; 0 for continuous actions.

    Raises:
        EngineError: the shapes differ or an action is not finite.
    """
    if reference.shape != candidate.shape or reference.ndim != 3 or not reference.size:
        raise EngineError(
            f"actions to compare must both be [n, horizon, dim] with n > 0, "
            f"got {list(reference.shape)} and {list(candidate.shape)}"
        )
    a, b = reference.astype(np.float64), candidate.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise EngineError("actions to compare must be finite, got NaN or infinity")
    difference = np.abs(a - b)
    largest, mean = difference.max(axis=(0, 1)), difference.mean(axis=(0, 1))
    # Bins are 2 / bins wide; float32 centres are a little off.
    flipped = (difference * bins > 1).mean(axis=(0, 1)) if bins else None
    return ActionDrift(
        cosine=_cosine(a, b),
        max_normalized=largest,
        mean_normalized=mean,
        rms_normalized=np.sqrt(np.square(difference).mean(axis=(0, 1))),
        max_physical=largest * unit,
        mean_physical=mean * unit,
        flipped=flipped,
        median_rms=float(np.median(np.sqrt(np.square(difference).mean(axis=(1, 2))))),
        observations=len(a),
        actions=a.shape[0] * a.shape[1],
    )


def _cosine(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float((a * b).sum()) / length if length else float(np.array_equal(a, b))
