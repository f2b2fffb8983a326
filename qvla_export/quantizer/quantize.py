"""THE quantizer: rows of a weight matrix -> integer codes and scales. numpy only.

Fake quantization, sensitivities and packing all use this one implementation. Fake quantization and
packing also share the order of inputs (`quantizer.coupling`), so what is judged is what is
shipped; sensitivities are measured in the natural order. w ~ (code - zero point) * scale, one of
both per channel or per group of consecutive inputs. Zero points are 0 unless a rule has them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.quantizer.scale_search import (
    CODE_RANGE,
    SCALE_LIMITS,
    Steps,
    in_groups,
    max_steps,
    nearest_codes,
    searched_steps,
)
from qvla_export.quantizer.two_level_scales import (
    CHANNEL_SCALE_BITS,
    LARGEST_MULTIPLIER,
    two_level_steps,
)
from qvla_export.shared.artifacts import set_fields
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.target import WIDTHS, ScaleForm, Target

ScaleRule = Literal["max", "mse"]
Compensation = Literal["none", "inputs", "inputs and channels"]


@dataclass(frozen=True)
class WidthRule:
    """How channels of one width get their scales."""

    # Consecutive inputs that share a scale; None for one scale per channel.
    group_size: int | None = None
    # "max": the largest |w| is the largest code. "mse": the scale of least squared error.
    scale: ScaleRule = "max"
    # Bits of a stored scale: 32 or 16. Codes are computed with the rounded scale.
    scale_bits: int = 32
    # Whether every scale has a zero point of its own; without, codes are symmetric.
    zero_points: bool = False
    # Whether a channel has one scale of `scale_bits`, and each group a whole multiple of it.
    two_level: bool = False

    def __post_init__(self) -> None:
        if self.two_level and (
            self.group_size is None
            or self.scale != "mse"
            or self.scale_bits != CHANNEL_SCALE_BITS
            or self.zero_points
        ):
            raise QvlaError(
                f"scales of two levels are of groups, searched, of {CHANNEL_SCALE_BITS} bits and "
                f"without zero points, got {self}"
            )
        if self.group_size is not None and self.group_size < 1:
            raise QvlaError(f"group_size must be at least 1 or None, got {self.group_size}")
        if self.scale not in get_args(ScaleRule):
            raise QvlaError(f"scale must be one of {get_args(ScaleRule)}, got {self.scale!r}")
        if self.scale_bits not in SCALE_LIMITS:
            raise QvlaError(f"scale_bits must be one of [16, 32], got {self.scale_bits}")

    def groups(self, inputs: int) -> int:
        """Return how many scales a channel of `inputs` weights has."""
        return 1 if self.group_size is None else -(-inputs // self.group_size)


@dataclass(frozen=True)
class QuantizerSpec:
    """Width (2, 4, 8) -> rule. 16 bits is the float16 rounding, 0 bits a row of zeros.

    What is more than rounding to nearest needs `quantizer.moments` of the very layer, and is done
    by `quantizer.compensation`; the result is a `quantizer.rounding.Rounding`.
    """

    rules: Mapping[int, WidthRule]
    # "mse" scales are those of least error in the action's first order, not in the weights.
    weighted_scales: bool = False
    # What the error of one weight is made up for by: weights of the same channel, or those and all
    # channels of the layer that are rounded after it.
    compensation: Compensation = "none"
    # Whether codes and scales answer at last what all layers do to the action together, see
    # `measurement.code_tuning`.
    tuned_codes: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.rules) - set(CODE_RANGE))
        if unknown:
            raise QvlaError(f"quantizer rules are for widths {sorted(CODE_RANGE)}, got {unknown}")
        two_level = {bits for bits, rule in self.rules.items() if rule.two_level}
        if beyond := sorted(two_level - set(LARGEST_MULTIPLIER)):
            raise QvlaError(
                f"scales of two levels are for {sorted(LARGEST_MULTIPLIER)} bits, got {beyond}"
            )
        if self.compensation not in get_args(Compensation):
            raise QvlaError(
                f"compensation must be one of {get_args(Compensation)}, got {self.compensation!r}"
            )
        if self.tuned_codes and not self.needs_moments:
            raise QvlaError(
                "codes are tuned that are made from what the layers are fed; measure "
                "sensitivities with --quantizer compensated"
            )

    @property
    def needs_moments(self) -> bool:
        """Whether weights alone do not determine the codes."""
        return self.weighted_scales or self.compensation != "none"

    def rule(self, bits: int) -> WidthRule:
        """Return the rule of one width.

        Raises:
            QvlaError: the specification has none.
        """
        if bits not in self.rules:
            raise QvlaError(
                f"the quantizer has no rule for {bits} bits; it has {sorted(self.rules)}"
            )
        return self.rules[bits]

    def to_json(self) -> dict[str, Any]:
        """Return what an artifact stores: the rules by width, and options that are in use."""
        rules = {
            str(bits): set_fields(rule, "zero_points", "two_level")
            for bits, rule in sorted(self.rules.items())
        }
        return rules | {
            name: getattr(self, name) for name in _OPTIONS if getattr(self, name) != _OPTIONS[name]
        }

    @staticmethod
    def from_json(value: Any) -> "QuantizerSpec":
        """Rebuild a specification.

        Raises:
            ArtifactError: the value is not one, or one of an option that is gone.
        """
        for name, was in _GONE.items() if isinstance(value, Mapping) else ():
            if name in value:
                raise ArtifactError(
                    f"it was made with {was}, which this version does not have; make "
                    "sensitivities, plan and codes anew: qvla sensitivities, qvla plan, qvla round"
                )
        try:
            options = {name: value[name] for name in _OPTIONS if name in value}
            rules = {int(k): WidthRule(**rule) for k, rule in value.items() if k not in _OPTIONS}
            return QuantizerSpec(rules, **options)
        except (AttributeError, TypeError, ValueError) as error:
            raise ArtifactError(f"not a quantizer specification: {error}; make it anew") from error


# Name of an option that was taken out -> what it was.
_GONE: Mapping[str, str] = {
    "bias_correction": "bias correction",
    "tuned_scales": "scales tuned alone (now --tune-codes)",
}
# Name of an option -> its default, which artifacts do not state.
_OPTIONS: Mapping[str, Any] = {
    field.name: field.default for field in fields(QuantizerSpec) if field.name != "rules"
}


def spec_for(target: Target) -> QuantizerSpec:
    """Return the quantizer of a target: its groups and scale bits, searched scales below 8 bits."""
    return QuantizerSpec(
        {
            bits: WidthRule(
                container.group_size,
                "max" if bits == 8 else "mse",
                container.scale_bits,
                container.zero_points,
                container.two_level,
            )
            for bits, container in target.containers.items()
            if bits in CODE_RANGE
        }
    )


def scale_form(spec: QuantizerSpec) -> ScaleForm:
    """Return whether a quantizer's scales have one level or two."""
    return "two-level" if any(rule.two_level for rule in spec.rules.values()) else "group"


def compensated_spec(target: Target) -> QuantizerSpec:
    """Return a target's quantizer with everything that what the layers are fed makes possible."""
    return replace(spec_for(target), weighted_scales=True, compensation="inputs and channels")


def as_rows(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Flatten a linear [out, in] or convolution [out, in, kh, kw] weight to [channels, inputs]."""
    return weight.reshape(weight.shape[0], -1)


def quantize_channels(
    weight: NDArray[np.float32],
    bits: int,
    spec: QuantizerSpec,
    input_second_moment: NDArray[np.float32] | None = None,
    kept: dict[int, Steps] | None = None,
) -> QuantizedWeight:
    """Quantize all given channels to one width.

    Args:
        weight: finite float32 [channels, inputs].
        bits: one of 0, 2, 4, 8, 16.
        spec: the rules.
        input_second_moment: E[x^2] of each input, weighs the errors of the "mse" rule;
            non-negative float32 [inputs]; None weighs all alike.
        kept: width -> steps of these very channels, which are not searched again; those that are
            missing are added.

    Raises:
        QvlaError: an unknown width, a weight that is not finite or not a matrix.
    """
    if weight.ndim != 2 or not np.isfinite(weight).all():
        raise QvlaError(
            f"weights must be a finite matrix [channels, inputs], got {list(weight.shape)}"
            f"{' with NaN or infinity' if weight.ndim == 2 else '; use as_rows'}"
        )
    if bits not in WIDTHS:
        raise QvlaError(f"bits must be one of {WIDTHS}, got {bits}")
    no_scales = np.zeros((weight.shape[0], 0), np.float32)
    if bits == 16:
        halves = np.clip(weight, -65504, 65504).astype(np.float16)
        return QuantizedWeight(halves, no_scales, 16, None)
    if bits == 0:
        return QuantizedWeight(np.zeros(weight.shape, np.int8), no_scales, 0, None)
    known = {} if kept is None else kept
    if bits not in known:
        known[bits] = channel_steps(weight, bits, spec, input_second_moment)
    return at_steps(weight, bits, spec, known[bits])


def channel_steps(
    weight: NDArray[np.float32],
    bits: int,
    spec: QuantizerSpec,
    input_second_moment: NDArray[np.float32] | None = None,
) -> Steps:
    """Return the scales and zero points that channels of 2, 4 or 8 bits get.

    Args: as in `quantize_channels`.
    """
    rule = spec.rule(bits)
    groups = in_groups(weight, rule.group_size)
    if rule.scale == "max":
        return max_steps(groups, bits, rule.scale_bits, rule.zero_points)
    importance = _grouped_importance(input_second_moment, weight.shape[1], rule.group_size)
    if rule.two_level:
        return two_level_steps(groups, bits, importance)
    return searched_steps(groups, bits, rule.scale_bits, importance, rule.zero_points)


def at_steps(
    weight: NDArray[np.float32], bits: int, spec: QuantizerSpec, steps: Steps
) -> QuantizedWeight:
    """Round channels of 2, 4 or 8 bits to the nearest codes at steps of [channels, groups].

    What `QuantizedWeight.dequantize` returned becomes the same codes again.
    """
    codes = nearest_codes(in_groups(weight, spec.rule(bits).group_size), steps, bits)
    return with_steps(codes.reshape(weight.shape[0], -1)[:, : weight.shape[1]], bits, spec, steps)


def with_steps(
    codes: NDArray[Any], bits: int, spec: QuantizerSpec, steps: Steps
) -> QuantizedWeight:
    """Return codes, whole numbers [channels, inputs], with what they stand for."""
    rule = spec.rule(bits)
    scales = steps.channel_scales if rule.two_level else steps.scales
    stored = scales if rule.scale_bits == 32 else scales.astype(np.float16)
    integers = np.ascontiguousarray(codes.astype(np.int8))
    zeros = steps.zero_points if rule.zero_points else None
    factors = steps.multipliers if rule.two_level else None
    return QuantizedWeight(integers, stored, bits, rule.group_size, zeros, factors)


def fake_quantize(
    weight: NDArray[np.float32],
    widths: NDArray[np.int8],
    spec: QuantizerSpec,
    input_second_moment: NDArray[np.float32] | None = None,
    kept: dict[int, Steps] | None = None,
) -> NDArray[np.float32]:
    """Return the weights an engine computes with, each channel at its own width.

    Args:
        weight: float32 [channels, inputs] (see `as_rows`).
        widths: int8 [channels], each in {0, 2, 4, 8, 16}.
        spec, input_second_moment, kept: as in `quantize_channels`.
    """
    if widths.shape != (weight.shape[0],):
        raise QvlaError(f"{weight.shape[0]} channels need as many widths, got {widths.shape}")
    result = np.empty(weight.shape, np.float32)
    for bits in np.unique(widths).tolist():
        rows = widths == bits
        quantized = quantize_channels(weight[rows], bits, spec, input_second_moment, kept)
        result[rows] = quantized.dequantize()
    return result


def _grouped_importance(
    moment: NDArray[np.float32] | None, inputs: int, group_size: int | None
) -> NDArray[np.float32] | None:
    if moment is None:
        return None
    if moment.shape != (inputs,) or not np.isfinite(moment).all() or (moment < 0).any():
        raise QvlaError(
            f"input_second_moment must be {inputs} finite non-negative numbers, "
            f"got shape {moment.shape}"
        )
    return in_groups(moment[None], group_size)
