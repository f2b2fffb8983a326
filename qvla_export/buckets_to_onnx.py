"""One bucketed linear map as ONNX nodes: packed codes, DequantizeLinear, MatMul, channel order."""

from collections.abc import Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.buckets import ChannelBuckets, bucket_channels
from qvla_export.quantize import QuantizedWeight, QuantizerSpec, quantize_channels

# Names of a bucket's constants are "<layer>.b<bits>" and one of these.
CODES_SUFFIX, SCALES_SUFFIX, HALVES_SUFFIX = ".codes", ".scales", ".halves"
# Name of the constant that restores a layer's order by a Gather: "<layer>" and this.
ORDER_SUFFIX = ".order"
_CODE_TYPES = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
# ONNX Runtime 1.32 repacks INT2 columns four at a time and computes garbage otherwise.
_COLUMN_MULTIPLE = {2: 4}
# Pieces up to which Split + Concat is used instead of a Gather. Two layers that share an order
# (gate and up of a gated MLP) need at most 4 + 16.
_MOST_PIECES = 24


@dataclass(frozen=True)
class BucketedWeight:
    """A layer's weight, one `QuantizedWeight` for each width that occurs except 0."""

    buckets: ChannelBuckets
    weights: tuple[QuantizedWeight, ...]

    @property
    def channels(self) -> int:
        """Output channels, pruned ones included."""
        return len(self.buckets.order)


def bucket_weight(
    rows: NDArray[np.float32], widths: NDArray[np.int8], spec: QuantizerSpec
) -> BucketedWeight:
    """Quantize a layer's rows float32 [channels, inputs], each at its width int8 [channels]."""
    buckets = bucket_channels(widths)
    weights = tuple(
        quantize_channels(rows[buckets.channels(bits)], bits, spec)
        for bits, _, _ in buckets.runs
        if bits
    )
    return BucketedWeight(buckets, weights)


def emit_buckets(
    tape: ir.tape.Tape, name: str, inputs: ir.Value, weight: BucketedWeight
) -> ir.Value:
    """Record the nodes that compute inputs [..., K] -> outputs [..., channels], bias excluded.

    Cases:
        1. every channel is pruned: zeros of the right shape;
        2. one width, no filling: a single MatMul, no Concat, no Gather;
        3. else the buckets' outputs side by side and the channels' order restored.
           Pruned channels pick a column of zeros: a filled-up one if there is one.
    """
    if not weight.weights:
        return _zeros(tape, name, inputs, weight.channels)
    columns = [_filled(w.codes.shape[0], w.bits) for w in weight.weights]
    outputs = [
        _bucket(tape, f"{name}.b{w.bits}", inputs, w, filled)
        for w, filled in zip(weight.weights, columns, strict=True)
    ]
    index, needs_zero = _gather_index(weight, columns)
    if needs_zero:
        outputs[-1] = _append_zero(tape, name, outputs[-1])
    joined = outputs[0] if len(outputs) == 1 else tape.op("Concat", outputs, {"axis": -1})
    rank = None if inputs.shape is None else inputs.shape.rank()
    return _restore_order(tape, name, joined, index, sum(columns) + needs_zero, rank)


def _restore_order(
    tape: ir.tape.Tape,
    name: str,
    joined: ir.Value,
    index: NDArray[np.int64],
    columns: int,
    rank: int | None,
) -> ir.Value:
    """Pick columns of [..., columns] by index, as ONNX Runtime does it fastest.

    Cases:
        1. all columns as they are: nothing;
        2. few runs of consecutive columns: Slice, or Split and Concat;
        3. else a Gather of the transposed: it copies whole rows, along the last axis single
           numbers. 90 x 768 on one AVX2 thread: 38 us, transposing included, and 157 us.
    """
    if np.array_equal(index, np.arange(columns)):
        return joined
    cuts = np.flatnonzero(np.diff(index) != 1) + 1
    starts = index[np.concatenate([[0], cuts])]
    stops = index[np.concatenate([cuts - 1, [-1]])] + 1
    bounds = np.unique(np.concatenate([starts, stops, [0, columns]]))
    if len(starts) == 1:
        limits = [np.array([value], np.int64) for value in (starts[0], stops[0], -1)]
        names = ("start", "stop", "axis")
        constants = [_constant(tape, f"{name}.{n}", v) for n, v in zip(names, limits, strict=True)]
        return tape.op("Slice", [joined, *constants])
    if max(len(starts), len(bounds) - 1) <= _MOST_PIECES:
        sizes = _constant(tape, f"{name}.pieces", np.diff(bounds))
        pieces = tape.op_multi_out(
            "Split", [joined, sizes], {"axis": -1}, num_outputs=len(bounds) - 1
        )
        picked = [
            pieces[i]
            for start, stop in zip(starts, stops, strict=True)
            for i in range(*np.searchsorted(bounds, [start, stop]))
        ]
        return tape.op("Concat", picked, {"axis": -1})
    order = _constant(tape, name + ORDER_SUFFIX, index.astype(np.int32))
    if rank is None:
        return tape.op("Gather", [joined, order], {"axis": -1})
    rows = tape.op("Transpose", [joined], {"perm": [rank - 1, *range(rank - 1)]})
    gathered = tape.op("Gather", [rows, order], {"axis": 0})
    return tape.op("Transpose", [gathered], {"perm": [*range(1, rank), 0]})


def _gather_index(weight: BucketedWeight, columns: Sequence[int]) -> tuple[NDArray[np.int64], bool]:
    """Column of each channel among the joined outputs; whether a zero column must be appended."""
    index = np.empty(weight.channels, np.int64)
    zero_column = None
    start = 0
    for bucket, filled in zip(weight.weights, columns, strict=True):
        channels = weight.buckets.channels(bucket.bits)
        index[channels] = np.arange(start, start + len(channels))
        if filled > len(channels):
            zero_column = start + len(channels)
        start += filled
    pruned = weight.buckets.channels(0)
    index[pruned] = start if zero_column is None else zero_column
    return index, zero_column is None and len(pruned) > 0


def _bucket(
    tape: ir.tape.Tape, name: str, inputs: ir.Value, weight: QuantizedWeight, columns: int
) -> ir.Value:
    """One width: codes [K, columns], blocks of scales along K, MatMul."""
    codes = _columns(weight.codes, columns, 0)
    if weight.bits == 16:
        stored = _constant(tape, name + HALVES_SUFFIX, codes)
        matrix = tape.op("Cast", [stored], {"to": ir.DataType.FLOAT})
        return tape.op("MatMul", [inputs, matrix])
    packed = _constant(tape, name + CODES_SUFFIX, codes.astype(_CODE_TYPES[weight.bits]))
    scales = _columns(weight.scales, columns, 1)
    if weight.group_size is None:
        attributes = {"axis": 1}
        scales = scales[0]
    else:
        attributes = {"axis": 0, "block_size": weight.group_size}
    scale = _constant(tape, name + SCALES_SUFFIX, scales)
    if scales.dtype != np.float32:
        # Folded at load. A float16 scale fed directly would keep MatMulNBits from forming.
        scale = tape.op("Cast", [scale], {"to": ir.DataType.FLOAT})
    matrix = tape.op("DequantizeLinear", [packed, scale], attributes)
    return tape.op("MatMul", [inputs, matrix])


def _filled(channels: int, bits: int) -> int:
    multiple = _COLUMN_MULTIPLE.get(bits, 1)
    return -(-channels // multiple) * multiple


def _columns(rows: NDArray[np.generic], columns: int, value: int) -> NDArray[np.generic]:
    """Transpose [channels, n] to [n, columns], further columns filled with a value."""
    missing = columns - rows.shape[0]
    padded = np.pad(rows, ((0, missing), (0, 0)), constant_values=value) if missing else rows
    return np.ascontiguousarray(padded.T)


def _append_zero(tape: ir.tape.Tape, name: str, outputs: ir.Value) -> ir.Value:
    pads = _constant(tape, f"{name}.pads", np.array([0, 1], np.int64))
    axes = _constant(tape, f"{name}.pad_axis", np.array([-1], np.int64))
    return tape.op("Pad", [outputs, pads, None, axes])


def _zeros(tape: ir.tape.Tape, name: str, inputs: ir.Value, channels: int) -> ir.Value:
    leading = tape.op("Shape", [inputs], {"start": 0, "end": -1})
    width = _constant(tape, f"{name}.channels", np.array([channels], np.int64))
    shape = tape.op("Concat", [leading, width], {"axis": 0})
    zero = _constant(tape, f"{name}.zero", np.zeros(1, np.float32))
    return tape.op("Expand", [zero, shape])


def _constant(tape: ir.tape.Tape, name: str, value: NDArray[np.generic]) -> ir.Value:
    return tape.initializer(ir.Tensor(value, name=name))
