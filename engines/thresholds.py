"""The noun `Thresholds`: how far an engine's actions may lie from those it must reproduce.

Two things move an action away from torch's: the engine's arithmetic, which has a measured bound for
every compute type, and nothing else for a float policy. A quantized policy's own action error is
larger than that, and an engine that adds a small fraction of it serves as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from engines.drift import ActionDrift
from qvla_export.shared.target import ComputeType

# A float policy's cosine (issue 3): below it, an engine computes something else.
MIN_COSINE = 0.999


@dataclass(frozen=True)
class Arithmetic:
    """What a compute type's rounding may do to normalized actions (the range is 2)."""

    rms: float
    max: float
    # Share of a token head's actions whose argmax was a near tie.
    flipped: float
    # Of a quantized policy: share of the plan's own action error, where that is more.
    plan_share: float


# Measured 2026-11 against float32 torch, 32 observations of the reference policy and 64 of the
# tiny one of the tests; each bound is at least three times the largest figure:
#            largest |difference|   RMS of a dimension   flipped bins
# float32    9e-6 (ONNX Runtime)    9e-7                 0
# float16    5.4e-3 (autocast)      8.5e-4               0.15 %
# bfloat16   5.3e-2 (autocast)      6.6e-3               0.63 %
ARITHMETIC: Mapping[ComputeType, Arithmetic] = {
    "float32": Arithmetic(rms=1e-4, max=1e-3, flipped=0.002, plan_share=0.01),
    "float16": Arithmetic(rms=4e-3, max=2e-2, flipped=0.01, plan_share=0.1),
    "bfloat16": Arithmetic(rms=3e-2, max=0.16, flipped=0.03, plan_share=0.1),
}
# Independent errors add in quadrature: a tenth of the plan's makes the policy's error 0.5 % larger.
# Where activations are rounded, the last bits of the arithmetic decide ties, each a whole code: the
# engine's error is a draw of the same kind as the plan's own. Measured with 8-bit weights and
# activations on ONNX Runtime, reference policy: up to 0.40 of the plan's RMS in a dimension and
# 0.61 of its largest difference, while the error of both together was 1.04 of the plan's. Three
# quarters of the RMS would make it 1.25.
_ROUNDED_SHARE = 0.75
# The largest difference of a few observations varies more than the RMS does.
_MAX_SHARES = 2

Figure = Literal["max_normalized", "mean_normalized", "rms_normalized", "flipped"]
_WORDS: Mapping[Figure, str] = {
    "max_normalized": "the largest |difference|",
    "mean_normalized": "the mean |difference|",
    "rms_normalized": "the RMS difference",
    "flipped": "the share of actions in another bin",
}


@dataclass(frozen=True)
class Thresholds:
    """What an engine's `ActionDrift` may be at most."""

    # At least; None where other figures judge better.
    cosine: float | None
    # Figure -> largest allowed value.  float64 [dim]
    allowed: Mapping[Figure, NDArray[np.float64]]
    # Where the numbers come from.
    reason: str

    def to_json(self) -> dict[str, object]:
        """Return what a report stores."""
        allowed = {figure: limit.tolist() for figure, limit in self.allowed.items()}
        return {"cosine": self.cosine, "allowed": allowed, "reason": self.reason}

    def breaches(self, drift: ActionDrift) -> tuple[str, ...]:
        """Return what exceeds its threshold in words, the worst dimension of each figure."""
        found = []
        for figure, limit in self.allowed.items():
            measured = getattr(drift, figure)
            if (measured > limit).any():
                worst = int(np.argmax(measured / np.maximum(limit, np.finfo(float).tiny)))
                found.append(
                    f"{_WORDS[figure]} in dimension {worst} is {measured[worst]:.2e}"
                    f"{_physical(drift, figure, worst)}, allowed are {limit[worst]:.1e}"
                )
        if self.cosine is not None and not drift.cosine >= self.cosine:
            found.append(f"the cosine is {drift.cosine:.6f}, required are {self.cosine}")
        return tuple(found)

    def plus(self, other: "Thresholds") -> "Thresholds":
        """Return the thresholds of two engines compared with each other: both may be off."""
        allowed = {name: limit + other.allowed[name] for name, limit in self.allowed.items()}
        cosine = None if None in (self.cosine, other.cosine) else self.cosine
        return Thresholds(cosine, allowed, f"{self.reason}; and the other's: {other.reason}")

    def beyond(self, *plan_errors: ActionDrift) -> "Thresholds":
        """Return thresholds wider by plans' own errors, for engines of different plans.

        Twice their errors, which may have been measured on other observations; of those the
        largest difference says nothing, so that it is no longer judged.
        """
        allowed: dict[Figure, NDArray[np.float64]] = {
            name: limit + 2 * sum(getattr(error, name) for error in plan_errors)
            for name, limit in self.allowed.items()
            if name != "max_normalized"
        }
        return Thresholds(None, allowed, f"{self.reason}; twice the plans' own errors on top")


def thresholds_for(
    compute: ComputeType, plan_error: ActionDrift | None, like: ActionDrift, rounded: bool
) -> Thresholds:
    """Return what an engine may differ by from torch with the same weights.

    Args:
        compute: the target's compute type.
        plan_error: the quantized policy against full precision in torch; None for a float policy.
        like: any drift on the same observations: gives the numbers of dimensions and of actions,
            and whether actions are bins.
        rounded: whether the plan rounds activations to integers.
    """
    floor, dimensions = ARITHMETIC[compute], len(like.max_normalized)
    smallest: dict[Figure, float]
    if like.flipped is None:
        smallest = {"rms_normalized": floor.rms, "max_normalized": floor.max}
    else:
        # One near tie says nothing, however few actions there are and however far its bin is.
        flipped = max(floor.flipped, 1 / like.actions)
        smallest = {"flipped": flipped, "mean_normalized": max(floor.flipped, 2 / like.actions)}
    allowed = {name: np.full(dimensions, value) for name, value in smallest.items()}
    if plan_error is None:
        cosine = MIN_COSINE if like.flipped is None else None
        return Thresholds(cosine, allowed, f"rounding of {compute}")
    share = _ROUNDED_SHARE if rounded else floor.plan_share
    for name, limit in allowed.items():
        shares = share * (_MAX_SHARES if name == "max_normalized" else 1)
        np.maximum(limit, shares * getattr(plan_error, name), out=limit)
    reason = f"{share:.0%} of the plan's own action error, at least rounding of {compute}"
    return Thresholds(None, allowed, reason)


def _physical(drift: ActionDrift, figure: Figure, dimension: int) -> str:
    values = {"max_normalized": drift.max_physical, "mean_normalized": drift.mean_physical}
    if figure not in values:
        return ""
    return f" (normalized; {values[figure][dimension]:.2e} in the robot's units)"
