"""Scales of groups of weights, and codes at given scales. numpy only; part of the quantizer.

Groups are float32 [channels, groups, group size], see `grouped`; scales float32 [channels, groups].
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

# Lowest and highest code. With the "max" rule the extra negative level of 4 and 2 bits stays
# unused; the "mse" rule finds scales at which it pays.
CODE_RANGE: Mapping[int, tuple[int, int]] = {2: (-2, 1), 4: (-8, 7), 8: (-127, 127)}
# Bits of a stored scale -> smallest and largest.
SCALE_LIMITS: Mapping[int, tuple[float, float]] = {32: (1e-30, 1e30), 16: (2.0**-24, 65504.0)}

_SMALLEST_PEAK = 1e-8  # the official code's floor of max|w|; keeps scales positive
_BLOCK_WEIGHTS = 1 << 16  # weights searched at once: a block and its temporaries stay in cache


def grouped(values: NDArray[np.float32], group_size: int | None) -> NDArray[np.float32]:
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


def _stored(scales: NDArray[np.float32], scale_bits: int) -> NDArray[np.float32]:
    """Scales as they will be stored: rounded to their bits, strictly positive, finite."""
    low, high = SCALE_LIMITS[scale_bits]
    clipped = scales.clip(low, high)
    rounded = clipped.astype(np.float16) if scale_bits == 16 else clipped
    return rounded.astype(np.float32)


def max_scales(groups: NDArray[np.float32], bits: int, scale_bits: int) -> NDArray[np.float32]:
    """Scale of each group at which the largest |w| is the largest code, as stored."""
    return _stored(_peaks(groups) / np.float32(CODE_RANGE[bits][1]), scale_bits)


def nearest_codes(
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


def searched_scales(
    groups: NDArray[np.float32],
    bits: int,
    scale_bits: int,
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
            scales = _stored(peaks[block] * factor, scale_bits)
            error = nearest_codes(groups[block], scales, bits)
            error *= scales[:, :, None]
            error -= groups[block]
            weighted = error if importance is None else error * importance
            errors = np.einsum("cgi,cgi->cg", error, weighted)
            better = errors < least
            least = np.where(better, errors, least)
            best[block] = np.where(better, scales, best[block])
    return best
