"""Quantized activations: one symmetric scale for each input of planned layers. numpy only.

As `QuantizeLinear` and `DequantizeLinear` do it on ONNX Runtime and on TensorRT alike:
x ~ s * clip(rint(x / s), -128, 127), ties to even, zero point 0, which TensorRT demands. The range
is 127 * s, so that both signs fit; code -128 costs nothing and is where both runtimes saturate.
Ranges come from `qvla_export.quantizer.activation_statistics`. By tokens, an input is divided by
each token's largest |x| before and multiplied by it behind the product, and s is of what is left.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from qvla_export.shared.errors import QvlaError

# What one range for all tokens is chosen by.
HistogramMethod = Literal["max", "percentile", "mse", "entropy"]
RangeMethod = Literal["max", "percentile", "mse", "entropy", "token"]
METHODS: tuple[RangeMethod, ...] = get_args(RangeMethod)
# Action error of the reference policy, 8 bits, 64 observations to measure on and 64 to judge by:
# 0.0151 RMS; "mse" 0.0204, "max" 0.0235, "entropy" 0.10. Few numbers of heavy tails fix a range.
DEFAULT_METHOD: HistogramMethod = "percentile"
# Lowest and highest code. 8 bits run on every target; 4 bits are simulated in torch only.
ACTIVATION_CODES: Mapping[int, tuple[int, int]] = {8: (-128, 127), 4: (-8, 7)}
# Of "token": what the highest code stands for, as a share of a token's largest |x|. Of the shares
# that were tried at 4 bits the reference policy moves least with this one (docs/results.md).
TOKEN_SHARES: Mapping[int, float] = {8: 1.0, 4: 0.85}
# What gives images their one range beside it: few codes are better spent on most numbers.
IMAGE_METHODS: Mapping[int, HistogramMethod] = {8: DEFAULT_METHOD, 4: "mse"}
# What a target's refusals call it.
TOKEN_RANGES = "ranges of tokens"
# Below it a token counts as zeros.
SMALLEST_TOKEN = 1e-6
# float16's smallest normal number and its largest.
_SMALLEST_SCALE, _LARGEST_SCALE = 2.0**-14, 65504.0


@dataclass(frozen=True)
class ActivationRanges:
    """How the inputs of planned layers are rounded; layers that share an input share a range.

    Raises:
        QvlaError: an unknown bit width or method, a range that is not positive and finite.
    """

    # 8, or 4 for simulation.
    bits: int
    # How the ranges were chosen.
    method: RangeMethod
    # Layer name -> |x| of the highest code, or its share of each token's largest |x|.
    ranges: Mapping[str, float]
    # Layers whose range is such a share.
    per_token: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.bits not in ACTIVATION_CODES:
            raise QvlaError(f"activations have 8 bits, or 4 in simulation, got {self.bits!r}")
        if self.method not in METHODS:
            raise QvlaError(f"the method must be one of {list(METHODS)}, got {self.method!r}")
        if unknown := sorted(self.per_token - set(self.ranges)):
            raise QvlaError(f"layers rounded token by token need a range: {unknown[:3]} have none")
        for name, value in self.ranges.items():
            if not (np.isfinite(value) and value > 0):
                raise QvlaError(
                    f"the activation range of {name} must be finite and above 0, got {value!r}; "
                    "measure again: qvla activations"
                )

    @property
    def codes(self) -> tuple[int, int]:
        """Lowest and highest code."""
        return ACTIVATION_CODES[self.bits]

    def scale(self, layer: str) -> np.float32:
        """Return the step between the codes of a layer's input."""
        return np.float32(self.ranges[layer] / self.codes[1])

    def restricted_to(self, layers: Collection[str]) -> "ActivationRanges":
        """Return the ranges of some of the layers."""
        kept = {name: limit for name, limit in self.ranges.items() if name in layers}
        return replace(self, ranges=kept, per_token=self.per_token & set(kept))

    def require_layers(self, layers: Iterable[str]) -> None:
        """Refuse a plan's layers that do not all have a range, or ranges of others.

        Raises:
            QvlaError: naming the first that differ.
        """
        wanted, found = set(layers), set(self.ranges)
        if wanted != found:
            raise QvlaError(
                f"a plan needs an activation range for each of its layers: "
                f"{sorted(wanted - found)[:3]} have none, {sorted(found - wanted)[:3]} are not "
                "in the plan; measure this policy: qvla activations"
            )

    def to_json(self) -> dict[str, Any]:
        """Return what a plan stores."""
        value = {"bits": self.bits, "method": self.method, "ranges": dict(self.ranges)}
        return value | ({"per_token": sorted(self.per_token)} if self.per_token else {})

    @staticmethod
    def from_json(value: Any) -> "ActivationRanges | None":
        """Rebuild ranges; None, or "none" as older plans have it, leaves activations in float.

        Raises:
            KeyError, TypeError, ValueError, QvlaError: the value is not one.
        """
        if value in (None, "none"):
            return None
        ranges = {name: float(limit) for name, limit in value["ranges"].items()}
        per_token = value.get("per_token", [])
        if not isinstance(per_token, list) or not all(isinstance(n, str) for n in per_token):
            raise TypeError(f"per_token must be a list of layers, got {per_token!r}")
        return ActivationRanges(value["bits"], value["method"], ranges, frozenset(per_token))


def storable_range(limit: float, bits: int) -> float:
    """Return the nearest range whose scale is a float16 number.

    Targets that compute in float16 have float16 scales; so one plan means the same everywhere.
    """
    highest = ACTIVATION_CODES[bits][1]
    scale = np.float16(np.clip(limit / highest, _SMALLEST_SCALE, _LARGEST_SCALE))
    return float(scale) * highest
