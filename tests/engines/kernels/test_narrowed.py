"""Codes of 2 and 4 bits are found again in the int8 numbers that they were expanded to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.kernels.narrowed import narrowed
from engines.kernels.tile_layout import WidthCodes, lay_out


def expanded(width: WidthCodes) -> np.ndarray:
    if width.factors is None:
        return width.codes
    spread = np.repeat(width.factors.astype(int), 64, axis=1)[:, : width.codes.shape[1]]
    return width.codes * spread


@given(seed=st.integers(0, 2**32 - 1), inputs=st.sampled_from([1, 63, 64, 100, 256]))
def test_every_channel_is_held_exactly_and_no_wider_than_it_was(seed: int, inputs: int) -> None:
    generator = np.random.default_rng(seed)
    bits = generator.choice([2, 4, 8], 40)
    rows = []
    for width in bits.tolist():
        low = -(1 << (width - 1))
        codes = generator.integers(low, -low, inputs)
        size = generator.choice([64, 128])
        most = 128 >> (width - 1) if width < 8 else 1
        factors = np.repeat(generator.integers(1, most + 1, -(-inputs // size)), size)[:inputs]
        rows.append(codes * factors)
    matrix = np.array(rows).astype(np.int8)
    scales = generator.uniform(1, 2, 40).astype(np.float32)
    found = narrowed(matrix, scales)
    held = np.zeros_like(matrix)
    for width in found:
        held[width.channels] = expanded(width)
        np.testing.assert_array_equal(width.scales, scales[width.channels])
        assert (width.bits <= bits[width.channels]).all()
    np.testing.assert_array_equal(held, matrix)
    lay_out(found, matrix.shape)  # takes every one


@pytest.mark.parametrize(
    ("row", "bits"),
    [
        ([127] * 64, 8),
        ([112, -128] * 32, 4),
        ([64, -128] * 32, 2),
        ([63, -126] * 32, 2),
        ([7, -8] * 32, 4),
        ([1, -2] * 32, 2),
        ([2, 1] * 32, 4),
        ([5, 3, -7, -9] * 16, 8),
    ],
)
def test_the_fewest_bits(row: list[int], bits: int) -> None:
    (width,) = narrowed(np.array([row], np.int8), np.ones(1, np.float32))
    assert width.bits == bits
    np.testing.assert_array_equal(expanded(width)[0], row)


def test_channels_of_zeros_are_left_out() -> None:
    assert narrowed(np.zeros((3, 64), np.int8), np.ones(3, np.float32)) == []
