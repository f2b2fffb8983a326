"""Codes of the fewest bits for whole-number weights of one scale a channel. numpy only."""

import numpy as np
from numpy.typing import NDArray

from engines.kernels.tile_layout import STEP_BYTES, WidthCodes


def narrowed(matrix: NDArray[np.int8], scales: NDArray[np.float32]) -> list[WidthCodes]:
    """Return each channel at the fewest bits that hold it exactly; none of what is all zeros.

    A channel of 2- or 4-bit codes times whole factors is found again, whatever it was stored as:
    of every 64 inputs the largest factor a tile takes that divides all of them is at least the one
    they were multiplied by.

    Args:
        matrix: int8 [channels, inputs].
        scales: float32 [channels].
    """
    channels, inputs = matrix.shape
    filled = np.pad(matrix, ((0, 0), (0, -inputs % STEP_BYTES))).astype(np.int16)
    groups = filled.reshape(channels, -1, STEP_BYTES)
    common = np.gcd.reduce(np.abs(groups), axis=2)
    left = np.flatnonzero(common.any(axis=1))
    found = []
    for bits in (2, 4):
        factors = _largest_divisors(common[left], 128 >> (bits - 1))
        codes = groups[left] // factors[:, :, None]
        low = -(1 << (bits - 1))
        fits = ((codes >= low) & (codes < -low)).all(axis=(1, 2))
        if fits.any():
            rows = codes[fits].reshape(int(fits.sum()), -1)[:, :inputs].astype(np.int8)
            mine, factor = left[fits], factors[fits].astype(np.uint8)
            found.append(WidthCodes(bits, mine, rows, scales[mine], factor))
        left = left[~fits]
    if len(left):
        found.append(WidthCodes(8, left, matrix[left], scales[left]))
    return found


def _largest_divisors(numbers: NDArray[np.int16], most: int) -> NDArray[np.int16]:
    """Return the largest divisor of each number that is not above a limit; of 0 it is 1."""
    found = np.ones_like(numbers)
    for divisor in range(2, most + 1):
        found[(numbers % divisor == 0) & (numbers > 0)] = divisor
    return found
