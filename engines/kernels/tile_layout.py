"""The noun `TileLayout`: a layer's packed codes as one launch reads them. numpy only.

A tile is `TILE` channels of one width. It is stored in steps of `STEP_BYTES` a channel, so that a
program reads one stretch of memory a step: 64 codes of 8 bits a channel, 128 of 4, 256 of 2, or 32
numbers of 16. Byte b of a step holds, lowest bits first, the codes of inputs b, b + 64, b + 128 ...
of it: to unpack is to shift, and each shift gives 64 inputs that follow each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.base import EngineError

TILE = 64
STEP_BYTES = 64
# Of the narrowest codes.
INPUTS_OF_A_STEP = STEP_BYTES * 4
# Most inputs of a layer: sums of products of two int8 numbers stay within 32 bits.
MOST_INPUTS = (2**31 - 1) // (128 * 128)
# Columns of the table of tiles.
BITS, FIRST_STEP, FIRST_FACTOR, TABLE_COLUMNS = 0, 1, 2, 3


@dataclass(frozen=True)
class WidthCodes:
    """A layer's channels of one width, as a bundle stores them."""

    bits: int
    # Their places in the layer's output.  int64 [n]
    channels: NDArray[np.int64]
    # int8 (2, 4 and 8 bits) or float16 (16 bits)  [n, inputs]
    codes: NDArray[np.generic]
    # One a channel.  float32 [n]
    scales: NDArray[np.float32]
    # Of each group of inputs, times the channel's scale: whole numbers up to 255 (two levels) or
    # float16 scales; None where a channel has one scale only.  uint8 or float16 [n, groups]
    factors: NDArray[np.generic] | None = None


@dataclass(frozen=True)
class TileLayout:
    """Tiles of one layer, narrowest last, pruned channels behind them."""

    inputs: int
    channels: int
    # Bytes of a group's factor: 1 (a whole number), 2 (a half); 0 where there are no groups.
    factor_bytes: int
    # Steps of all tiles, one after the other.  uint8 [bytes]
    codes: NDArray[np.uint8]
    # Width, first step, first factor of each tile.  int32 [tiles, 3]
    table: NDArray[np.int32]
    # Factors of all tiles, [words][TILE] of each, a word being those of one step's parts, or of
    # two steps' where one's are 2 bytes: what is copied ahead is 4 bytes at least.  uint8 [bytes]
    factors: NDArray[np.uint8]
    # Of each slot of a tile: its channel's scale, bias and place; -1 is a slot that is empty.
    # float32, float32, int32 [tiles * TILE]
    scales: NDArray[np.float32]
    biases: NDArray[np.float32]
    places: NDArray[np.int32]

    @property
    def tiles(self) -> int:
        """Return the number of tiles."""
        return len(self.table)

    @property
    def nbytes(self) -> int:
        """Return the bytes that a GPU holds of it."""
        arrays = (self.codes, self.table, self.factors, self.scales, self.biases, self.places)
        return sum(array.nbytes for array in arrays)


def lay_out(
    widths: Sequence[WidthCodes], shape: tuple[int, int], bias: NDArray[np.float32] | None = None
) -> TileLayout:
    """Lay a layer's channels out in tiles; those of no width are pruned and give their bias.

    Args:
        widths: the channels that are computed, of every width once.
        shape: channels of the layer, pruned ones included, and inputs.
        bias: float32 [channels]; None for zeros.

    Raises:
        EngineError: codes that no tile holds; the message names the rule and the width.
    """
    channels, inputs = shape
    kind = _require_tiles(widths, channels, inputs)
    pruned = np.setdiff1d(np.arange(channels), np.concatenate([[-1], *_places(widths)]))
    table, codes, factors, scales, places = [], [], [], [], []
    steps = factor_bytes = 0
    for width in sorted(widths, key=lambda w: -w.bits):
        for start in range(0, len(width.channels), TILE):
            one = slice(start, start + TILE)
            table.append((width.bits, steps, factor_bytes))
            codes.append(_steps(width.bits, width.codes[one]))
            steps += len(codes[-1])
            factors.append(_factors(width, one, inputs, kind))
            factor_bytes += len(factors[-1])
            scales.append(_filled(width.scales[one], 0))
            places.append(_filled(width.channels[one], -1))
    for start in range(0, len(pruned), TILE):
        table.append((0, 0, 0))
        scales.append(np.zeros(TILE))
        places.append(_filled(pruned[start : start + TILE], -1))
    place = np.concatenate(places).astype(np.int32)
    whole = np.zeros(channels, np.float32) if bias is None else bias.astype(np.float32)
    return TileLayout(
        inputs,
        channels,
        0 if kind is None else kind.itemsize,
        np.concatenate([np.zeros(0, np.uint8), *(tile.ravel() for tile in codes)]),
        np.array(table, np.int32).reshape(-1, TABLE_COLUMNS),
        np.concatenate([np.zeros(0, np.uint8), *factors]),
        np.concatenate(scales).astype(np.float32),
        np.where(place >= 0, whole[place], 0).astype(np.float32),
        place,
    )


def steps_of(bits: int, inputs: int) -> int:
    """Return how many steps the inputs of a channel of a width take."""
    return -(-inputs // (STEP_BYTES * 8 // bits))


def _places(widths: Sequence[WidthCodes]) -> list[NDArray[np.int64]]:
    return [width.channels for width in widths]


def _require_tiles(widths: Sequence[WidthCodes], channels: int, inputs: int) -> Any:
    """Refuse what no tile holds; return the factors' type, None where there are none."""
    if channels < 1:
        raise EngineError(f"a layer must have a channel, got {channels}")
    places = np.concatenate([np.zeros(0, np.int64), *_places(widths)])
    if len(set(places.tolist())) < len(places) or not np.all((places >= 0) & (places < channels)):
        raise EngineError(
            f"every channel must have one place of 0 to {channels - 1}, got {places.tolist()[:8]}"
        )
    kinds = set()
    for width in widths:
        if width.bits not in (2, 4, 8, 16):
            raise EngineError(f"a tile's width must be 2, 4, 8 or 16 bits, got {width.bits}")
        shape = (len(width.channels), inputs)
        if width.codes.shape != shape or width.scales.shape != shape[:1]:
            raise EngineError(
                f"codes of {width.bits} bits must have shape {list(shape)} and a scale a channel, "
                f"got {list(width.codes.shape)} and {list(width.scales.shape)}"
            )
        if width.factors is not None:
            if width.bits not in (2, 4):
                raise EngineError(f"channels of {width.bits} bits have one scale each, got groups")
            _group_size(inputs, width.factors.shape[1])
            kinds.add(width.factors.dtype)
            most = 128 >> (width.bits - 1)
            if width.factors.dtype == np.uint8 and width.factors.max(initial=0) > most:
                raise EngineError(
                    f"a factor of {width.bits} bits must be {most} at most, so that codes times it "
                    f"are int8 numbers, got {width.factors.max()}"
                )
    if not 0 < inputs <= MOST_INPUTS:
        raise EngineError(f"a tile takes 1 to {MOST_INPUTS} inputs, got {inputs}")
    if len(kinds) > 1 or kinds - {np.dtype(np.uint8), np.dtype(np.float16)}:
        raise EngineError(
            f"a layer's factors must all be uint8 or all float16, got {sorted(map(str, kinds))}"
        )
    return kinds.pop() if kinds else None


def _group_size(inputs: int, groups: int) -> int:
    """Return 64 or 128, the groups that targets have; one group may be any size."""
    for size in (64, 128):
        if -(-inputs // size) == groups:
            return size
    raise EngineError(
        f"groups must be of 64 or 128 inputs, {groups} of {inputs} inputs are of another; "
        "export for a target of this version"
    )


def _steps(bits: int, codes: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return the packed steps of one tile.  uint8 [steps, TILE, STEP_BYTES]"""
    count, inputs = codes.shape
    steps = steps_of(bits, inputs)
    shape = (TILE, steps * STEP_BYTES * 8 // bits)
    if bits == 16:
        halves = np.zeros(shape, codes.dtype)
        halves[:count, :inputs] = codes
        packed = halves.reshape(TILE, steps, -1).view(np.uint8)
        return np.ascontiguousarray(packed.transpose(1, 0, 2))
    low = -(1 << (bits - 1))
    if codes.size and not (low <= int(codes.min()) and int(codes.max()) < -low):
        raise EngineError(
            f"codes of {bits} bits must be {low} to {-low - 1}, got {codes.min()} to {codes.max()}"
        )
    whole = np.zeros(shape, np.int8)
    whole[:count, :inputs] = codes
    parts = whole.view(np.uint8).reshape(TILE, steps, 8 // bits, STEP_BYTES)
    packed = np.zeros((TILE, steps, STEP_BYTES), np.uint8)
    for part in range(8 // bits):
        packed |= (parts[:, :, part] & ((1 << bits) - 1)) << (bits * part)
    return np.ascontiguousarray(packed.transpose(1, 0, 2))


def _factors(width: WidthCodes, one: slice, inputs: int, kind: Any) -> NDArray[np.uint8]:
    """Return the bytes of one tile's factors, those of each step's parts side by side."""
    if kind is None or width.bits not in (2, 4):
        return np.zeros(0, np.uint8)
    steps, parts = steps_of(width.bits, inputs), 8 // width.bits
    found = np.ones((TILE, steps * parts), kind)
    if width.factors is not None:
        spread = _group_size(inputs, width.factors.shape[1]) // STEP_BYTES
        stored = np.repeat(width.factors[one], spread, axis=1)[:, : steps * parts]
        found[: len(stored), : stored.shape[1]] = stored
    together = 2 * parts if parts * kind.itemsize == 2 else parts
    filled = np.pad(found, ((0, 0), (0, -found.shape[1] % together)))
    ordered = filled.reshape(TILE, -1, together).transpose(1, 0, 2)
    return np.ascontiguousarray(ordered).view(np.uint8).ravel()


def _filled(values: NDArray[np.generic], filler: float) -> NDArray[np.generic]:
    missing = [(0, TILE - len(values))] + [(0, 0)] * (values.ndim - 1)
    return np.pad(values, missing, constant_values=filler)
