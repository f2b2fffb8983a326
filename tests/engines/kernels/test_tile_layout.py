"""A layer in tiles: every code is where the kernel reads it, and hostile ones are refused."""

import numpy as np
import pytest

from engines.base import EngineError
from engines.kernels.tile_layout import STEP_BYTES, TILE, TileLayout, WidthCodes, lay_out, steps_of


def width_codes(bits: int, places: list[int], inputs: int, groups: int = 0) -> WidthCodes:
    generator = np.random.default_rng(bits)
    shape = (len(places), inputs)
    codes = generator.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape).astype(np.int8)
    factors = generator.integers(1, 17, (len(places), groups)).astype(np.uint8) if groups else None
    scales = generator.uniform(1, 2, len(places)).astype(np.float32)
    return WidthCodes(bits, np.array(places), codes, scales, factors)


def stored_codes(layout: TileLayout, tile: int) -> np.ndarray:
    """Read a tile's codes one by one, as the layout's words say.  [TILE, inputs]"""
    bits, first, _ = layout.table[tile].tolist()
    steps = layout.codes.reshape(-1, TILE, STEP_BYTES)[
        first : first + steps_of(bits, layout.inputs)
    ]
    codes = np.zeros((TILE, layout.inputs), int)
    for number in range(layout.inputs):
        step, rest = divmod(number, STEP_BYTES * 8 // bits)
        part, byte = divmod(rest, STEP_BYTES)
        code = steps[step, :, byte].astype(int) >> bits * part & (1 << bits) - 1
        codes[:, number] = np.where(code >= 1 << (bits - 1), code - (1 << bits), code)
    return codes


@pytest.mark.parametrize("inputs", [1, 64, 130, 256, 300])
def test_codes_lie_where_the_kernel_reads_them(inputs: int) -> None:
    order = np.random.default_rng(0).permutation(180).tolist()
    groups = -(-inputs // 64)
    widths = [
        width_codes(8, order[:70], inputs),
        width_codes(4, order[70:80], inputs, groups),
        width_codes(2, order[80:170], inputs, groups),
    ]
    bias = np.arange(180, dtype=np.float32)
    layout = lay_out(widths, (180, inputs), bias)
    assert layout.table[:, 0].tolist() == [8, 8, 4, 2, 2, 0]
    seen = []
    for tile in range(layout.tiles):
        places = layout.places[tile * TILE : (tile + 1) * TILE]
        mine = places[places >= 0]
        seen += mine.tolist()
        np.testing.assert_array_equal(
            layout.biases[tile * TILE : (tile + 1) * TILE][: len(mine)], bias[mine]
        )
        bits = int(layout.table[tile, 0])
        if bits:
            (width,) = (w for w in widths if w.bits == bits)
            rows = [width.channels.tolist().index(place) for place in mine.tolist()]
            np.testing.assert_array_equal(
                stored_codes(layout, tile)[: len(mine)], width.codes[rows]
            )
            assert not stored_codes(layout, tile)[len(mine) :].any()
    assert sorted(seen) == list(range(180))


def test_whole_tiles_of_two_bits_take_a_quarter_of_a_byte_a_weight() -> None:
    layout = lay_out([width_codes(2, list(range(128)), 512)], (128, 512))
    assert layout.codes.nbytes == 128 * 512 // 4
    assert layout.factors.nbytes == 0
    grouped = lay_out([width_codes(2, list(range(128)), 512, 8)], (128, 512))
    assert grouped.factors.nbytes == 128 * 8


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"bits": 3}, "2, 4, 8 or 16 bits, got 3"),
        ({"channels": np.array([0, 0])}, "one place of 0 to 1"),
        ({"channels": np.array([0, 2])}, "one place of 0 to 1"),
        ({"codes": np.full((2, 64), 9, np.int8)}, "codes of 4 bits must be -8 to 7"),
        ({"codes": np.zeros((2, 63), np.int8)}, "must have shape"),
        ({"scales": np.ones(3, np.float32)}, "a scale a channel"),
        ({"factors": np.full((2, 1), 17, np.uint8)}, "must be 16 at most"),
        ({"factors": np.ones((2, 3), np.uint8)}, "64 or 128 inputs"),
        ({"factors": np.ones((2, 1), np.float32)}, "all be uint8 or all float16"),
        ({"bits": 8, "factors": np.ones((2, 1), np.uint8)}, "8 bits have one scale"),
    ],
)
def test_what_no_tile_holds_is_refused(change: dict[str, object], words: str) -> None:
    fields = {
        "bits": 4,
        "channels": np.array([0, 1]),
        "codes": np.zeros((2, 64), np.int8),
        "scales": np.ones(2, np.float32),
    }
    with pytest.raises(EngineError, match=words):
        lay_out([WidthCodes(**(fields | change))], (2, 64))


def test_sums_that_leave_32_bits_are_refused() -> None:
    with pytest.raises(EngineError, match="1 to 131071 inputs"):
        lay_out([], (2, 131072))
