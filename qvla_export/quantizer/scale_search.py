"""Scales and zero points of groups of weights, codes at given ones. numpy only; of the quantizer.

Groups are float32 [channels, groups, group size], see `grouped`; scales float32 [channels, groups].
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

# Lowest and highest code. With the "max" rule the extra negative level of 4 and 2 bits stays
# unused; the "mse" rule finds scales at which it pays.
CODE_RANGE: Mapping[int, tuple[int, int]] = {2: (-2, 1), 4: (-8, 7), 8: (-127, 127)}
# Bits of a stored scale -> smallest and largest.
SCALE_LIMITS: Mapping[int, tuple[float, float]] = {32: (1e-30, 1e30), 16: (2.0**-24, 65504.0)}

_SMALLEST_PEAK = 1e-8  # the official code's floor of max|w|; keeps scales positive
_BLOCK_WEIGHTS = 1 << 16  # weights searched at once: a block and its temporaries stay in cache
# Scales of two bits to try, as multiples of max|w|; 1 is the "max" rule.
_GRID = np.concatenate([np.geomspace(0.1, 0.5, 14), np.geomspace(0.5, 1.0, 9)[1:]])
# Below this multiple two bits reach a second level of one sign, and below that a third; above both
# zero points add nothing to levels -1, 0 and 1.
_SECOND_LEVEL, _THIRD_LEVEL = 2 / 3, 2 / 5
# Bits -> zero point that is tried of any group -> multiples it is tried below. Those of 4 bits, at
# a quarter of the scale, contain the levels of 2 bits: -1 to 2, 0 to 3 and -3 to 0.
_OFFSETS: Mapping[int, Mapping[int, float]] = {
    2: {-1: _SECOND_LEVEL, -2: _SECOND_LEVEL, 1: _SECOND_LEVEL},
    4: {-1: _SECOND_LEVEL, -5: _THIRD_LEVEL, 4: _THIRD_LEVEL},
}
# Scales to try where the codes go from the smallest to the largest weight, as multiples.
_SHRUNK = np.linspace(1.0, 0.6, 9)

# Scales and zero points to try.  float32 [channels, groups]; the same or one for all
_Candidate = tuple[NDArray[np.float32], NDArray[np.float32] | int]


@dataclass(frozen=True)
class Steps:
    """What the codes of groups stand for: (code - zero point) * scale."""

    # As stored; of two levels a channel's scale times the groups' multipliers, which is exact.
    # float32 [channels, groups]
    scales: NDArray[np.float32]
    # Codes that stand for 0, within the range of codes; None where all are 0.
    # int8 [channels, groups]
    zero_points: NDArray[np.int8] | None = None
    # Whole numbers from 1, of which a scale is so many times its channel's; None where scales have
    # one level.  uint8 [channels, groups]
    multipliers: NDArray[np.uint8] | None = None

    @property
    def channel_scales(self) -> NDArray[np.float32]:
        """Scales of two levels without their multipliers.  float32 [channels, 1]"""
        assert self.multipliers is not None
        # Exact: 11 bits times 7 fit a float32, and so does the quotient.
        scales: NDArray[np.float32] = np.divide(self.scales[:, :1], self.multipliers[:, :1])
        return scales

    def of(self, channels: NDArray[Any], groups: int | None = None) -> "Steps":
        """Return those of some channels, and of their first groups."""
        chosen = (channels, slice(groups))
        return self._each(lambda values, _: values[chosen])

    @staticmethod
    def concatenate(parts: "Sequence[Steps]") -> "Steps":
        """Return those of several layers, one's channels after the other's."""
        zeros = [part.zero_points for part in parts if part.zero_points is not None]
        factors = [part.multipliers for part in parts if part.multipliers is not None]
        return Steps(
            np.concatenate([part.scales for part in parts]),
            np.concatenate(zeros) if zeros else None,
            np.concatenate(factors) if factors else None,
        )

    def padded_to(self, channels: int) -> "Steps":
        """Return them followed by scales of 1 and zero points of 0, so many channels in all."""
        missing = ((0, channels - len(self.scales)), (0, 0))
        return self._each(lambda values, rest: np.pad(values, missing, constant_values=rest))

    def by_input(self, group_size: int | None, inputs: int) -> "Steps":
        """Return them for every input: group after group.  [channels, inputs]"""
        size = group_size or inputs
        return self._each(lambda values, _: np.repeat(values, size, axis=1)[:, :inputs])

    def _each(self, change: Callable[[NDArray[Any], int], NDArray[Any]]) -> "Steps":
        """Return them with every array changed; `change` is also given what stands for nothing."""
        zeros, factors = self.zero_points, self.multipliers
        return Steps(
            change(self.scales, 1),
            None if zeros is None else change(zeros, 0),
            None if factors is None else change(factors, 1),
        )


def in_groups(values: NDArray[np.float32], group_size: int | None) -> NDArray[np.float32]:
    """[channels, inputs] -> [channels, groups, group size], the last group filled with zeros."""
    channels, inputs = values.shape
    size = group_size or inputs
    missing = -inputs % size
    if missing:
        values = np.pad(values, ((0, 0), (0, missing)))
    return np.ascontiguousarray(values, dtype=np.float32).reshape(channels, -1, size)


def _peaks(groups: NDArray[np.float32]) -> NDArray[np.float32]:
    """Largest |w| of each group, floored.  float32 [channels, groups]"""
    peaks: NDArray[np.float32] = np.abs(groups).max(axis=2, initial=0.0)
    return np.maximum(peaks, np.float32(_SMALLEST_PEAK))


def storable_scales(scales: NDArray[np.float32], scale_bits: int) -> NDArray[np.float32]:
    """Return scales as they will be stored: rounded to their bits, strictly positive, finite."""
    low, high = SCALE_LIMITS[scale_bits]
    clipped = scales.clip(low, high)
    rounded = clipped.astype(np.float16) if scale_bits == 16 else clipped
    return rounded.astype(np.float32)


def max_steps(groups: NDArray[np.float32], bits: int, scale_bits: int, zero_points: bool) -> Steps:
    """Return steps at which the largest |w| is the largest code.

    With zero points, those at which the codes go from the smallest to the largest weight where they
    have the smaller squared error.
    """
    if not zero_points:
        return Steps(storable_scales(_max_scales(groups, bits), scale_bits))

    def candidates(block: NDArray[np.float32]) -> Iterator[_Candidate]:
        yield _max_scales(block, bits), 0
        yield _whole_range(block, bits)

    return _least_error(groups, bits, scale_bits, None, candidates)


def searched_steps(
    groups: NDArray[np.float32],
    bits: int,
    scale_bits: int,
    importance: NDArray[np.float32] | None,
    zero_points: bool,
) -> Steps:
    """Return the steps of the least squared error that were tried.

    The candidates nest: the levels of some 4-bit steps contain those that any 2-bit steps use, the
    levels of some 8-bit steps those of any 4-bit steps. So more bits never mean more error. Steps
    without zero points are tried first, so that equal errors keep them.

    Args:
        groups: see `grouped`.
        bits: 2, 4 or 8.
        scale_bits: of a stored scale.
        importance: weight of each input's squared error, float32 [1, groups, group size]; None
            weighs all alike.
        zero_points: whether others than 0 are tried.
    """

    def candidates(block: NDArray[np.float32]) -> Iterator[_Candidate]:
        peaks = _peaks(block)
        # From the largest scale down, so that equal errors keep the coarsest codes.
        for factor in _scale_grid(bits)[::-1]:
            yield peaks * factor, 0
        if zero_points:
            yield from _with_zero_points(block, bits)

    found = _least_error(groups, bits, scale_bits, importance, candidates)
    return found if zero_points else Steps(found.scales)


def blocks_of(groups: NDArray[np.float32]) -> Iterator[slice]:
    """Yield channels that are searched together: with their temporaries they stay in cache."""
    channels, _, size = groups.shape
    rows = max(1, _BLOCK_WEIGHTS // max(1, groups[0].size if channels else size))
    for start in range(0, channels, rows):
        yield slice(start, start + rows)


def group_errors(
    groups: NDArray[np.float32],
    scales: NDArray[np.float32],
    bits: int,
    importance: NDArray[np.float32] | None,
    zeros: NDArray[np.float32] | int = 0,
) -> NDArray[np.float32]:
    """Return each group's (weighted) squared error at given scales.  float32 [channels, groups]

    Args:
        groups: see `in_groups`.
        scales: as stored.  float32 [channels, groups]
        bits: of the codes.
        importance: as in `searched_steps`.
        zeros: zero points, [channels, groups] or one for all.
    """
    low, high = CODE_RANGE[bits]
    offset = zeros if isinstance(zeros, int) else zeros[:, :, None]
    error = groups / scales[:, :, None]
    np.rint(error, out=error)
    np.clip(error, low - offset, high - offset, out=error)
    error *= scales[:, :, None]
    error -= groups
    weighted = error if importance is None else error * importance
    errors: NDArray[np.float32] = np.einsum("cgi,cgi->cg", error, weighted)
    return errors


def nearest_codes(groups: NDArray[np.float32], steps: Steps, bits: int) -> NDArray[np.float32]:
    """Integer codes, as float32, round half to even."""
    low, high = CODE_RANGE[bits]
    codes: NDArray[np.float32] = groups / steps.scales[:, :, None]
    np.rint(codes, out=codes)
    if steps.zero_points is not None:
        codes += steps.zero_points[:, :, None]
    np.clip(codes, low, high, out=codes)
    return codes


def _max_scales(groups: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    return _peaks(groups) / np.float32(CODE_RANGE[bits][1])


def _scale_grid(bits: int) -> NDArray[np.float32]:
    """Scales to try with zero points of 0, as multiples of max|w|."""
    grid = _GRID
    if bits >= 4:
        # With s/4 the levels of two bits are among those of four. Without level -2, s/7 has them.
        grid = np.where(grid < _SECOND_LEVEL, grid * 7 / 4, grid)
    if bits == 8:
        grid = np.append(grid * 127 / (7 * 15), 1.0)
    return np.sort(grid).astype(np.float32) / np.float32(CODE_RANGE[bits][1])


def _offset_grid(bits: int) -> Iterator[tuple[float, int]]:
    """Scales to try, as multiples of max|w|, with zero points that are tried of any group."""
    if bits == 8:
        yield from ((scale / 15, 15 * zero) for scale, zero in _offset_grid(4))
        return
    for zero, most in _OFFSETS[bits].items():
        tried = [float(factor) for factor in _GRID[::-1] if factor < most]
        yield from ((factor / (4 if bits == 4 else 1), zero) for factor in tried)


def _with_zero_points(groups: NDArray[np.float32], bits: int) -> Iterator[_Candidate]:
    peaks = _peaks(groups)
    for factor, zero in _offset_grid(bits):
        yield peaks * np.float32(factor), zero
    if bits == 2:
        return  # all zero points were tried
    scales, zeros = _whole_range(groups, 4)
    if bits == 8:
        yield from ((scales * np.float32(f / 15), 15 * zeros) for f in _SHRUNK)
        yield _whole_range(groups, 8)
    else:
        yield from ((scales * np.float32(f), zeros) for f in _SHRUNK)


def _whole_range(
    groups: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Scales and zero points at which codes go from the smallest weight, or 0, to the largest."""
    low, high = CODE_RANGE[bits]
    smallest, largest = groups.min(axis=2, initial=0.0), groups.max(axis=2, initial=0.0)
    scales = np.maximum(largest - smallest, np.float32(_SMALLEST_PEAK)) / np.float32(high - low)
    zeros = np.clip(np.rint(np.float32(low) - smallest / scales), low, high)
    return scales, zeros


def _least_error(
    groups: NDArray[np.float32],
    bits: int,
    scale_bits: int,
    importance: NDArray[np.float32] | None,
    candidates: Callable[[NDArray[np.float32]], Iterable[_Candidate]],
) -> Steps:
    """Return the first of the candidates with the least (weighted) squared error, group by group.

    Args:
        candidates: of a block of channels.
    """
    best = np.empty(groups.shape[:2], np.float32)
    best_zeros = np.zeros(groups.shape[:2], np.int8)
    for rows_of in blocks_of(groups):
        block = groups[rows_of]
        least = np.full(block.shape[:2], np.inf, np.float32)
        for wanted, zeros in candidates(block):
            scales = storable_scales(wanted, scale_bits)
            errors = group_errors(block, scales, bits, importance, zeros)
            better = errors < least
            least = np.where(better, errors, least)
            best[rows_of] = np.where(better, scales, best[rows_of])
            best_zeros[rows_of] = np.where(better, zeros, best_zeros[rows_of])
    return Steps(best, best_zeros)
