"""THE quantizer: rows of a weight matrix -> integer codes and scales. numpy only.

Fake quantization, sensitivities and packing all use this one implementation. Fake quantization and
packing also share the order of inputs (`qvla_export.coupling`), so what is judged is what is
shipped; sensitivities are measured in the natural order. Symmetric: w ~ code * scale, scale > 0,
one scale per channel or per group of consecutive inputs.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from qvla_export.errors import ArtifactError, QvlaError
from qvla_export.target import WIDTHS, Target

ScaleRule = Literal["max", "mse"]

# Lowest and highest code. With the "max" rule the extra negative level of 4 and 2 bits stays
# unused; the "mse" rule finds scales at which it pays.
CODE_RANGE: Mapping[int, tuple[int, int]] = {2: (-2, 1), 4: (-8, 7), 8: (-127, 127)}

_SMALLEST_PEAK = 1e-8  # the official code's floor of max|w|; keeps scales positive
_SCALE_LIMITS: Mapping[int, tuple[float, float]] = {32: (1e-30, 1e30), 16: (2.0**-24, 65504.0)}
_BLOCK_WEIGHTS = 1 << 16  # weights searched at once: a block and its temporaries stay in cache


@dataclass(frozen=True)
class WidthRule:
    """How channels of one width get their scales."""

    # Consecutive inputs that share a scale; None for one scale per channel.
    group_size: int | None = None
    # "max": the largest |w| is the largest code. "mse": the scale of least squared error.
    scale: ScaleRule = "max"
    # Bits of a stored scale: 32 or 16. Codes are computed with the rounded scale.
    scale_bits: int = 32

    def __post_init__(self) -> None:
        if self.group_size is not None and self.group_size < 1:
            raise QvlaError(f"group_size must be at least 1 or None, got {self.group_size}")
        if self.scale not in get_args(ScaleRule):
            raise QvlaError(f"scale must be one of {get_args(ScaleRule)}, got {self.scale!r}")
        if self.scale_bits not in _SCALE_LIMITS:
            raise QvlaError(f"scale_bits must be one of [16, 32], got {self.scale_bits}")


@dataclass(frozen=True)
class QuantizerSpec:
    """Width (2, 4, 8) -> rule. 16 bits is the float16 rounding, 0 bits a row of zeros."""

    rules: Mapping[int, WidthRule]

    def __post_init__(self) -> None:
        unknown = sorted(set(self.rules) - set(CODE_RANGE))
        if unknown:
            raise QvlaError(f"quantizer rules are for widths {sorted(CODE_RANGE)}, got {unknown}")

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
        """Return what an artifact stores."""
        return {str(bits): asdict(rule) for bits, rule in sorted(self.rules.items())}

    @staticmethod
    def from_json(value: Any) -> "QuantizerSpec":
        """Rebuild a specification.

        Raises:
            ArtifactError: the value is not one.
        """
        try:
            return QuantizerSpec({int(bits): WidthRule(**rule) for bits, rule in value.items()})
        except (AttributeError, TypeError, ValueError) as error:
            raise ArtifactError(f"not a quantizer specification: {error}") from error


@dataclass(frozen=True)
class QuantizedWeight:
    """Channels of one width, as they are stored."""

    # Codes; the rounded weights themselves at 16 bits.
    # int8 (2, 4, 8 and, all zero, 0 bits) or float16 (16 bits)  [channels, inputs]
    codes: NDArray[np.int8] | NDArray[np.float16]
    # Positive; as stored, so float32 or float16.  [channels, groups]; no groups at 16 and 0 bits
    scales: NDArray[np.float32] | NDArray[np.float16]
    bits: int
    # Inputs that share a scale; None for one scale per channel.
    group_size: int | None

    def dequantize(self) -> NDArray[np.float32]:
        """Return the weights an engine computes with.  float32 [channels, inputs]"""
        weights = self.codes.astype(np.float32)
        if self.scales.shape[1] == 0:
            return weights
        scales = self.scales.astype(np.float32)
        inputs = weights.shape[1]
        if self.group_size is not None:
            scales = np.repeat(scales, self.group_size, axis=1)[:, :inputs]
        return weights * scales

    @property
    def nbytes(self) -> int:
        """Packed size in bytes, scales included."""
        return -(-self.codes.size * self.bits // 8) + self.scales.nbytes


def spec_for(target: Target) -> QuantizerSpec:
    """Return the quantizer of a target: its groups and scale bits, searched scales below 8 bits."""
    return QuantizerSpec(
        {
            bits: WidthRule(
                container.group_size, "max" if bits == 8 else "mse", container.scale_bits
            )
            for bits, container in target.containers.items()
            if bits in CODE_RANGE
        }
    )


def as_rows(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Flatten a linear [out, in] or convolution [out, in, kh, kw] weight to [channels, inputs]."""
    return weight.reshape(weight.shape[0], -1)


def quantize_channels(
    weight: NDArray[np.float32],
    bits: int,
    spec: QuantizerSpec,
    input_second_moment: NDArray[np.float32] | None = None,
) -> QuantizedWeight:
    """Quantize all given channels to one width.

    Args:
        weight: finite float32 [channels, inputs].
        bits: one of 0, 2, 4, 8, 16.
        spec: the rules.
        input_second_moment: E[x^2] of each input, weighs the errors of the "mse" rule;
            non-negative float32 [inputs]; None weighs all alike.

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
    rule = spec.rule(bits)
    inputs = weight.shape[1]
    groups = _grouped(weight, rule.group_size)
    if rule.scale == "mse":
        importance = _grouped_importance(input_second_moment, inputs, rule.group_size)
        scales = _searched_scales(groups, bits, rule, importance)
    else:
        scales = _stored(_peaks(groups) / np.float32(CODE_RANGE[bits][1]), rule)
    codes = _codes(groups, scales, bits).reshape(weight.shape[0], -1)[:, :inputs]
    stored = scales if rule.scale_bits == 32 else scales.astype(np.float16)
    return QuantizedWeight(
        np.ascontiguousarray(codes.astype(np.int8)), stored, bits, rule.group_size
    )


def fake_quantize(
    weight: NDArray[np.float32],
    widths: NDArray[np.int8],
    spec: QuantizerSpec,
    input_second_moment: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """Return the weights an engine computes with, each channel at its own width.

    Args:
        weight: float32 [channels, inputs] (see `as_rows`).
        widths: int8 [channels], each in {0, 2, 4, 8, 16}.
        spec, input_second_moment: as in `quantize_channels`.
    """
    if widths.shape != (weight.shape[0],):
        raise QvlaError(f"{weight.shape[0]} channels need as many widths, got {widths.shape}")
    result = np.empty(weight.shape, np.float32)
    for bits in np.unique(widths).tolist():
        rows = widths == bits
        quantized = quantize_channels(weight[rows], bits, spec, input_second_moment)
        result[rows] = quantized.dequantize()
    return result


def _grouped(values: NDArray[np.float32], group_size: int | None) -> NDArray[np.float32]:
    """[channels, inputs] -> [channels, groups, group size], the last group filled with zeros."""
    channels, inputs = values.shape
    size = group_size or inputs
    missing = -inputs % size
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return np.ascontiguousarray(values, dtype=np.float32).reshape(channels, -1, size)


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
    return _grouped(moment[None], group_size)


def _peaks(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest |w| of each group, floored.  float32 [channels, groups]"""
    peaks: NDArray[np.float32] = np.abs(groups).max(axis=2, initial=0.0)
    return np.maximum(peaks, np.float32(_SMALLEST_PEAK))


def _stored(scales: NDArray[np.float32], rule: WidthRule) -> NDArray[np.float32]:
    """Scales as they will be stored: rounded to their bits, strictly positive, finite."""
    low, high = _SCALE_LIMITS[rule.scale_bits]
    clipped = scales.clip(low, high)
    rounded = clipped.astype(np.float16) if rule.scale_bits == 16 else clipped
    return rounded.astype(np.float32)


def _codes(
    groups: NDArray[np.float32], scales: NDArray[np.float32], bits: int
) -> NDArray[np.float32]:
    """Integer codes, as float32, round half to even."""
    codes: NDArray[np.float32] = groups / scales[:, :, None]
    np.rint(codes, out=codes)
    np.clip(codes, *CODE_RANGE[bits], out=codes)
    return codes


def _scale_grid(bits: int) -> NDArray[np.float32]:
    """Scales to try, as multiples of max|w| / highest code; 1 is the "max" rule.

    The grids nest: the levels of some 4-bit scale contain those that any 2-bit scale uses, the
    levels of some 8-bit scale those of any 4-bit scale. So more bits never mean more error.
    """
    grid = np.concatenate([np.geomspace(0.1, 0.5, 14), np.geomspace(0.5, 1.0, 9)[1:]])
    if bits >= 4:
        # Two bits reach level -2 only below a multiple of 2/3; then s/4 contains their levels,
        # and s/7 otherwise.
        grid = np.where(grid < 2 / 3, grid * 7 / 4, grid)
    if bits == 8:
        grid = np.append(grid * 127 / (7 * 15), 1.0)
    return np.sort(grid).astype(np.float32)


def _searched_scales(
    groups: NDArray[np.float32],
    bits: int,
    rule: WidthRule,
    importance: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """Scale of each group with the least (weighted) squared error over `_scale_grid`."""
    channels, _, size = groups.shape
    rows = max(1, _BLOCK_WEIGHTS // max(1, groups[0].size if channels else size))
    grid = _scale_grid(bits) / np.float32(CODE_RANGE[bits][1])
    peaks = _peaks(groups)
    best = np.empty_like(peaks)
    for start in range(0, channels, rows):
        block = slice(start, start + rows)
        least = np.full(peaks[block].shape, np.inf, np.float32)
        # From the largest scale down, so that equal errors keep the coarsest codes.
        for factor in grid[::-1]:
            scales = _stored(peaks[block] * factor, rule)
            error = _codes(groups[block], scales, bits)
            error *= scales[:, :, None]
            error -= groups[block]
            weighted = error if importance is None else error * importance
            errors = np.einsum("cgi,cgi->cg", error, weighted)
            better = errors < least
            least = np.where(better, errors, least)
            best[block] = np.where(better, scales, best[block])
    return best
