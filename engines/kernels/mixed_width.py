"""One launch a layer: rows times channels of 2, 4, 8 and 16 bits, in Triton.

One program multiplies a block of rows with a tile of channels (`tile_layout`). The width of a tile
is one number of a table, the same for a whole program, so no thread waits for another. Codes go
into the tensor cores as they are, shifted to the top of a byte (8-bit activations) or as whole
numbers in halves (16-bit ones); a group's factor multiplies the sum of its products, which is the
same number as from factors times codes. Scales, biases, the channels' order and what pruned
channels give are applied at the end.

Source of the split of inputs among programs whose last one adds up: the semaphore of "Stream-K"
(Osama et al. 2023, section 4), here with fixed parts, added in their order.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from engines.kernels.packed_bytes import HALVES, INTEGERS

# Of `engines.kernels.tile_layout`, which imports no triton.
_TILE = tl.constexpr(64)
_STEP_BYTES = tl.constexpr(64)
_TABLE_COLUMNS = tl.constexpr(3)
_INTEGERS, _HALVES = tl.constexpr(INTEGERS), tl.constexpr(HALVES)


class RowPointers(NamedTuple):
    """What is multiplied."""

    # int8, float16 or bfloat16 [rows, inputs]
    data: Any
    # Of whole-number rows, float32 [1].
    scale: Any


class TilePointers(NamedTuple):
    """A layer, `tile_layout.TileLayout` on the device; codes of 16 bits in the rows' halves."""

    codes: Any
    table: Any
    factors: Any
    scales: Any
    biases: Any
    places: Any


class OutputPointers(NamedTuple):
    """Where sums go."""

    # float16, bfloat16 or float32 [rows, channels]
    data: Any
    # Sums of the parts that inputs are split in, int32 or float32 [parts, rows, tiles * TILE].
    sums: Any
    # Parts that are there, int32 [row blocks * tiles]; 0 before and after a launch.
    arrivals: Any


class ProductSizes(NamedTuple):
    """Sizes of one product."""

    rows: Any
    inputs: Any
    channels: Any


class Product(NamedTuple):
    """Everything of one launch but its form."""

    rows: RowPointers
    tiles: TilePointers
    output: OutputPointers
    sizes: ProductSizes


@triton.jit
def multiply_tiles(product, FORM: tl.constexpr):
    """Multiply one block of rows with one tile; grid [row blocks, tiles, parts]."""
    bits = tl.load(product.tiles.table + tl.program_id(1) * _TABLE_COLUMNS)
    if FORM.integers:
        sums = tl.zeros([FORM.block_rows, _TILE], tl.int32)
    else:
        sums = tl.zeros([FORM.block_rows, _TILE], tl.float32)
    if bits == 2:
        sums = _codes_times(product, 2, FORM)
    elif bits == 4:
        sums = _codes_times(product, 4, FORM)
    elif bits == 8:
        sums = _codes_times(product, 8, FORM)
    elif bits == 16:
        sums = _halves_times(product, FORM)
    if FORM.parts == 1:
        _put(sums, bits, product, FORM)
    else:
        _put_last(sums, bits, product, FORM)


@triton.jit
def _lines(FORM: tl.constexpr):
    """Return this program's rows.  int32 [block rows]"""
    return tl.program_id(0) * FORM.block_rows + tl.arange(0, FORM.block_rows)


@triton.jit
def _codes_times(product, BITS: tl.constexpr, FORM: tl.constexpr):
    """Return the sums of products with a tile of 2, 4 or 8 bits.  [block rows, TILE]"""
    INPUTS: tl.constexpr = _STEP_BYTES * 8 // BITS
    TOTAL: tl.constexpr = tl.int32 if FORM.integers else tl.float32
    rows, tiles, sizes = product.rows, product.tiles, product.sizes
    line = _lines(FORM)
    table = tiles.table + tl.program_id(1) * _TABLE_COLUMNS
    column, byte = tl.arange(0, _TILE), tl.arange(0, _STEP_BYTES)
    within = column[:, None] * _STEP_BYTES + byte[None, :]
    codes = tiles.codes + tl.load(table + 1).to(tl.int64) * _TILE * _STEP_BYTES + within
    words = _words(tiles.factors + tl.load(table + 2), BITS, FORM) + column
    values = rows.data + (line[:, None] * sizes.inputs + byte[None, :])
    steps = tl.cdiv(sizes.inputs, INPUTS)
    share = tl.cdiv(steps, FORM.parts)
    first = tl.program_id(2) * share
    sums = tl.zeros([FORM.block_rows, _TILE], TOTAL)
    for step in range(first, tl.minimum(first + share, steps)):
        packed = tl.load(codes + step * _TILE * _STEP_BYTES)
        if FORM.factor_bytes > 0 and BITS < 8:
            word = _word(words, tl.to_tensor(step), BITS, FORM)
        else:
            word = column
        for part in tl.static_range(8 // BITS):
            start = step * INPUTS + part * _STEP_BYTES
            block = tl.load(values + start, mask=_inside(line, start + byte, sizes, FORM), other=0)
            factor = _factor(word, part, BITS, FORM)[:, None]
            weights = _weights(packed, factor, block.dtype, part, BITS)
            sums = _product(block, weights, sums)
    return sums


@triton.jit
def _inside(line, number, sizes, FORM: tl.constexpr):
    """Return which of a block's rows and inputs there are.  [block rows, inputs]"""
    inside = (line < sizes.rows)[:, None] & (number >= 0)[None, :]
    if not FORM.whole_steps:
        inside = inside & (number < sizes.inputs)[None, :]
    return inside


@triton.jit
def _words(factors, BITS: tl.constexpr, FORM: tl.constexpr):
    """Return where factors lie, as `TileLayout.factors` says.  uint8 pointer -> word's"""
    if FORM.factor_bytes * 8 // BITS == 8:
        words = factors.to(tl.pointer_type(tl.uint64), bitcast=True)
    else:
        words = factors.to(tl.pointer_type(tl.uint32), bitcast=True)
    return words


@triton.jit
def _word(words, step, BITS: tl.constexpr, FORM: tl.constexpr):
    """Return the word of every channel that begins with a step's factors.  [TILE]"""
    if FORM.factor_bytes * 8 // BITS == 2:
        word = tl.load(words + step // 2 * _TILE) >> (step % 2 * 16).to(tl.uint32)
    else:
        word = tl.load(words + step * _TILE)
    return word


@triton.jit
def _factor(word, PART: tl.constexpr, BITS: tl.constexpr, FORM: tl.constexpr):
    """Return what multiplies one part of a step; 1 where there are no factors.  [TILE]"""
    if FORM.factor_bytes == 1 and BITS < 8:
        factor = ((word >> (8 * PART)) & 0xFF).to(tl.uint8)
    elif FORM.factor_bytes == 2 and BITS < 8:
        factor = (word >> (16 * PART)).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        factor = (word >= 0).to(tl.uint8)
    return factor


@triton.jit
def _plain_weights(packed, factor, kind, PART: tl.constexpr, BITS: tl.constexpr):
    """Return the codes at one place of every byte, times their factors, in the rows' type."""
    raised = (packed << (8 - BITS * (PART + 1))).to(tl.int8, bitcast=True)
    codes = (raised >> (8 - BITS)).to(tl.float32)
    return (codes * factor.to(tl.float32)).to(kind)


@triton.jit
def _word_weights(packed, factor, kind, PART: tl.constexpr, BITS: tl.constexpr):
    """Return what `_plain_weights` does, four bytes at once."""
    if kind == tl.int8 and BITS == 8:
        weights = packed.to(tl.int8, bitcast=True)
    elif kind == tl.int8:
        spread = tl.broadcast_to(factor.to(tl.int32), packed.shape)
        weights = tl.inline_asm_elementwise(
            _INTEGERS[BITS][PART], "=r,r,r,r,r,r", [packed, spread], tl.int8, True, 4
        )
    elif kind == tl.float16:
        spread = tl.broadcast_to(factor.to(tl.float16), packed.shape)
        weights = tl.inline_asm_elementwise(
            _HALVES[BITS][PART], "=r,=r,r,r,r", [packed, spread], tl.float16, True, 4
        )
    else:
        weights = _plain_weights(packed, factor, kind, PART, BITS)
    return weights


@triton.jit
def _dot(block, weights, sums):
    """Return sums and the products of a block of rows with a block of weights."""
    return tl.dot(block, tl.trans(weights), sums, out_dtype=sums.dtype)


@triton.jit
def _plain_dot(block, weights, sums):
    """Return what `_dot` does, bfloat16 widened, which the interpreter multiplies as integers."""
    if block.dtype == tl.bfloat16:
        block, weights = block.to(tl.float32), weights.to(tl.float32)
    return tl.dot(block, tl.trans(weights), sums, out_dtype=sums.dtype)


# Triton's interpreter runs no PTX.
_product = _plain_dot if triton.knobs.runtime.interpret else _dot
_weights = _plain_weights if triton.knobs.runtime.interpret else _word_weights


@triton.jit
def _halves_times(product, FORM: tl.constexpr):
    """Return the sums of products with a tile of 16 bits; of whole-number rows, their bits."""
    INPUTS: tl.constexpr = _STEP_BYTES // 2
    rows, tiles, sizes = product.rows, product.tiles, product.sizes
    half = tl.float16 if FORM.integers else rows.data.dtype.element_ty
    line = _lines(FORM)
    table = tiles.table + tl.program_id(1) * _TABLE_COLUMNS
    column, number = tl.arange(0, _TILE), tl.arange(0, INPUTS)
    within = column[:, None] * INPUTS + number[None, :]
    stored = tiles.codes.to(tl.pointer_type(half), bitcast=True)
    stored += tl.load(table + 1).to(tl.int64) * _TILE * INPUTS + within
    values = rows.data + (line[:, None] * sizes.inputs + number[None, :])
    steps = tl.cdiv(sizes.inputs, INPUTS)
    share = tl.cdiv(steps, FORM.parts)
    first = tl.program_id(2) * share
    sums = tl.zeros([FORM.block_rows, _TILE], tl.float32)
    for step in range(first, tl.minimum(first + share, steps)):
        start = step * INPUTS
        block = tl.load(values + start, mask=_inside(line, start + number, sizes, FORM), other=0)
        weights = tl.load(stored + step * _TILE * INPUTS)
        sums = _product(block.to(half), weights, sums)
    if FORM.integers:
        sums = sums.to(tl.int32, bitcast=True)
    return sums


@triton.jit
def _put_last(sums, bits, product, FORM: tl.constexpr):
    """Leave a part's sums; the last part to arrive adds all of them, in their order."""
    output, line = product.output, _lines(FORM)
    slots = tl.program_id(1) * _TILE + tl.arange(0, _TILE)
    stride = tl.num_programs(1) * _TILE
    place = output.sums + line[:, None].to(tl.int64) * stride + slots[None, :]
    inside = (line < product.sizes.rows)[:, None] & (slots >= 0)[None, :]
    size = product.sizes.rows * stride
    tl.store(place + tl.program_id(2) * size, sums, mask=inside)
    tl.debug_barrier()  # of all threads, before one of them says so
    arrival = output.arrivals + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(arrival, 1, sem="acq_rel") == FORM.parts - 1:
        total = tl.load(place, mask=inside, other=0)
        for part in range(1, FORM.parts):
            more = tl.load(place + part * size, mask=inside, other=0)
            total = _added(total, more, bits, FORM)
        _put(total, bits, product, FORM)
        tl.store(arrival, 0)


@triton.jit
def _added(one, other, bits, FORM: tl.constexpr):
    """Return the sum of two parts' sums."""
    if FORM.integers:
        floats = one.to(tl.float32, bitcast=True) + other.to(tl.float32, bitcast=True)
        total = tl.where(bits == 16, floats.to(tl.int32, bitcast=True), one + other)
    else:
        total = one + other
    return total


@triton.jit
def _put(sums, bits, product, FORM: tl.constexpr):
    """Store channels: sums times scales and bias, at their own places."""
    tiles, sizes, line = product.tiles, product.sizes, _lines(FORM)
    slots = tl.program_id(1) * _TILE + tl.arange(0, _TILE)
    scale, bias = tl.load(tiles.scales + slots), tl.load(tiles.biases + slots)
    place = tl.load(tiles.places + slots)
    if FORM.integers:
        floats = tl.where(bits == 16, sums.to(tl.float32, bitcast=True), sums.to(tl.float32))
        scale *= tl.load(product.rows.scale)
    else:
        floats = sums
    values = floats * scale[None, :] + bias[None, :]
    inside = (line < sizes.rows)[:, None] & (place >= 0)[None, :]
    output = product.output.data
    channel = output + line[:, None].to(tl.int64) * sizes.channels + place[None, :]
    tl.store(channel, values.to(output.dtype.element_ty), mask=inside)
