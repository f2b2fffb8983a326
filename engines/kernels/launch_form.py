"""Which form of the kernel multiplies how many rows. No torch, no triton."""

from typing import NamedTuple

from engines.kernels.tile_layout import INPUTS_OF_A_STEP, steps_of


class ProductForm(NamedTuple):
    """What a kernel is compiled for; a constant inside the kernel."""

    # Rows of one program: 16, 32, 64 or 128.
    block_rows: int
    # Programs that share a tile's inputs.
    parts: int
    # Bytes of a group's factor: 1 (a whole number), 2 (a half), 0 where there is none.
    factor_bytes: int
    # Whether inputs fill the steps of every width: nothing to leave out at their end.
    whole_steps: bool
    # Whether rows are int8, and products of codes are summed in int32.
    integers: bool
    # Warps of a program, and steps whose loads are under way at once.
    warps: int
    stages: int


# Programs that keep a GPU of 16 to 128 multiprocessors reading: tiles are split until there are so
# many, for up to 16 rows.
_MANY_PROGRAMS = 512
_MOST_PARTS = 8
# What tensor cores multiply at once at least.
FEWEST_ROWS = 16


def launch_form(
    rows: int, tiles: int, factor_bytes: int, inputs: int, integers: bool
) -> ProductForm:
    """Return the form for a number of rows.

    Args:
        rows: of the activations.
        tiles, factor_bytes, inputs: of the layer.
        integers: whether rows are int8.
    """
    whole = inputs % INPUTS_OF_A_STEP == 0
    if rows <= FEWEST_ROWS:
        most = min(_MOST_PARTS, max(1, steps_of(4, inputs) // 2))
        parts = 1
        while parts * 2 <= most and parts * tiles < _MANY_PROGRAMS:
            parts *= 2
        return ProductForm(FEWEST_ROWS, parts, factor_bytes, whole, integers, warps=4, stages=3)
    # Two warps unpack a tile's codes half as often as four. Halves of a factor, and what is left
    # out at the inputs' end, take registers that two do not have.
    warps = 2 if whole and factor_bytes < 2 else 4
    return ProductForm(64, 1, factor_bytes, whole, integers, warps, stages=3 if integers else 2)
