"""Scales of two levels: a float16 scale a channel, a whole number a group. numpy only.

A code times its group's multiplier is an int8 number, so that channels of 2, 4 and 8 bits can be
multiplied as one int8 matrix, and the channel's scale applied behind the sum. The product of scale
and multiplier is exact in float32: packed and expanded weights are the same numbers.
"""

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.scale_search import (
    CODE_RANGE,
    Steps,
    blocks_of,
    group_errors,
    searched_steps,
    storable_scales,
)

# Bits of a stored multiplier.
MULTIPLIER_BITS = 8
# Bits of a stored channel scale.
CHANNEL_SCALE_BITS = 16
# Bits -> largest multiplier: the lowest code times it is -128.
LARGEST_MULTIPLIER = {bits: 128 // -CODE_RANGE[bits][0] for bits in (2, 4)}
# Channel scales to try, as multiples of the one at which the largest group has the largest
# multiplier. On random rows (Gaussian, Student 4; groups of 64 and 128) the RMS error of 4 bits is
# 0.999 to 1.008 of that with free float16 scales, that of 2 bits 0.998 to 0.999; 26 multiples and
# all neighbours of every one gain another 0.002.
_MULTIPLES = np.linspace(0.9, 1.3, 9).astype(np.float32)


def two_level_steps(
    groups: NDArray[np.float32], bits: int, importance: NDArray[np.float32] | None
) -> Steps:
    """Return the channel scales and multipliers of the least squared error that were tried.

    First every group has the best scale of its own. Then channel scales are tried, each with the
    multipliers that come nearest to those, and at the best one every multiplier's neighbours.

    Args:
        groups: float32 [channels, groups, group size].
        bits: 2 or 4.
        importance: weight of each input's squared error, float32 [1, groups, group size]; None
            weighs all alike.
    """
    scales = np.empty(groups.shape[:2], np.float32)
    multipliers = np.empty(groups.shape[:2], np.uint8)
    for rows in blocks_of(groups):
        scale, multiplier = _best_of_block(groups[rows], bits, importance)
        scales[rows], multipliers[rows] = scale * multiplier, multiplier
    return Steps(scales, None, multipliers)


def expanded_codes(
    codes: NDArray[np.int8], multipliers: NDArray[np.uint8], group_size: int
) -> NDArray[np.int8]:
    """Return codes times their groups' multipliers.  int8 [channels, inputs]

    Args:
        codes: of 2 or 4 bits.  int8 [channels, inputs]
        multipliers: uint8 [channels, groups].
        group_size: inputs that share one.
    """
    spread = np.repeat(multipliers.astype(np.int16), group_size, axis=1)[:, : codes.shape[1]]
    return (codes * spread).astype(np.int8)


def _best_of_block(
    groups: NDArray[np.float32], bits: int, importance: NDArray[np.float32] | None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return channel scales [channels, 1] and multipliers [channels, groups]."""
    largest = np.float32(LARGEST_MULTIPLIER[bits])
    free = searched_steps(groups, bits, 32, importance, False).scales
    coarsest = free.max(axis=1, keepdims=True) / largest
    scale, multiplier = np.empty_like(coarsest), np.empty_like(free)
    errors, least = np.empty_like(free), np.full_like(coarsest, np.inf)
    for multiple in _MULTIPLES:
        tried = storable_scales(coarsest * multiple, CHANNEL_SCALE_BITS)
        nearest = np.clip(np.rint(free / tried), 1, largest)
        of_groups = group_errors(groups, tried * nearest, bits, importance)
        total = of_groups.sum(axis=1, keepdims=True)
        better = total < least
        scale, least = np.where(better, tried, scale), np.where(better, total, least)
        multiplier = np.where(better, nearest, multiplier)
        errors = np.where(better, of_groups, errors)
    middle = multiplier
    for neighbour in (middle - 1, middle + 1):
        tried = np.clip(neighbour, 1, largest)
        of_groups = group_errors(groups, scale * tried, bits, importance)
        better = of_groups < errors
        multiplier = np.where(better, tried, multiplier)
        errors = np.where(better, of_groups, errors)
    return scale, multiplier
