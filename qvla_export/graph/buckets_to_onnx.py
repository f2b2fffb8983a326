"""One bucketed linear map as ONNX nodes: packed codes, DequantizeLinear, MatMul, channel order."""

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.buckets import BucketedWeight
from qvla_export.quantizer.column_order import ColumnOrder, Run, column_order
from qvla_export.quantizer.packed_storage import stored_columns
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.shared.target import Container, Target

COMPUTE_TYPES = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
}
# Names of a bucket's constants are "<layer>.b<bits>" and one of these.
CODES_SUFFIX, SCALES_SUFFIX, HALVES_SUFFIX = ".codes", ".scales", ".halves"
ZERO_POINTS_SUFFIX, MULTIPLIERS_SUFFIX = ".zero_points", ".multipliers"
# Names of the constants that restore a layer's order end in one of these.
ORDER_SUFFIX, COLUMNS_SUFFIX, PIECES_SUFFIX, MEMBERS_SUFFIX = (
    ".order",
    ".columns",
    ".pieces",
    ".members",
)
SLICE_SUFFIXES, PAD_SUFFIXES = (".start", ".stop", ".axis"), (".pads", ".pad_axis")
# By the container's bits.
_CODE_TYPES = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
# Puts a packed constant where it stays until the graph is saved, maybe on disk.
Store = Callable[[ir.TensorProtocol], ir.TensorProtocol]


def keep(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """Keep a constant in memory."""
    return tensor


class BucketEmitter:
    """Records the nodes of bucketed layers as a target takes them.

    ONNX Runtime on a CPU fuses DequantizeLinear and MatMul if the scale is float32 then, so stored
    float16 scales and 16-bit weights pass a Cast, which it folds at load. Elsewhere scales are in
    the compute type and go straight in, as TensorRT's parser requires.
    """

    def __init__(self, target: Target, store: Store = keep) -> None:
        """Emit for a target.

        Args:
            target: its containers and compute type.
            store: gets every packed constant as soon as it is made.
        """
        self.tape = ir.tape.Tape()
        self._target = target
        self._store = store
        self._compute = COMPUTE_TYPES[target.compute]

    def constant(self, name: str, value: NDArray[np.generic]) -> ir.Value:
        """Record a constant."""
        return self.tape.initializer(ir.Tensor(value, name=name))

    def emit(
        self, name: str, inputs: ir.Value, weight: BucketedWeight, sizes: Sequence[int]
    ) -> list[ir.Value]:
        """Record inputs [..., K] -> outputs [..., n], one for each layer that is merged in this.

        Biases are not included. Pruned channels pick a column of zeros: a filled-up one if there
        is one. Where every channel is pruned the outputs are zeros.

        Args:
            name: of the layer; starts the constants' names.
            inputs: buckets that are stored in whole groups read it filled up with zeros.
            weight: of all layers side by side.
            sizes: their channels.
        """
        if not weight.weights:
            return [self._zeros(f"{name}.{i}", inputs, size) for i, size in enumerate(sizes)]
        columns = [
            stored_columns(w.codes.shape[0], self._target.containers[w.bits])
            for w in weight.weights
        ]
        width = weight.weights[0].codes.shape[1]
        rows = [self._target.containers[w.bits].stored_inputs(width) for w in weight.weights]
        read = {width: inputs}
        if max(rows) > width:
            read[max(rows)] = self._filled(name, inputs, max(rows) - width)
        outputs = [
            self._bucket(f"{name}.b{w.bits}", read[height], w, (height, filled))
            for w, height, filled in zip(weight.weights, rows, columns, strict=True)
        ]
        order = column_order(weight.buckets.widths, columns, sizes)
        if order.appends_zeros:
            outputs[-1] = self._pad(name, outputs[-1], 1)
        if not order.picks:
            return self._pieces(name, outputs, order)
        joined = self._joined(outputs)
        rank = None if inputs.shape is None else inputs.shape.rank()
        ordered = self._gathered(name, joined, order.index, rank)
        if len(sizes) == 1:
            return [ordered]
        lengths = self.constant(f"{name}{MEMBERS_SUFFIX}", np.array(sizes, np.int64))
        split = self.tape.op_multi_out(
            "Split", [ordered, lengths], {"axis": -1}, num_outputs=len(sizes)
        )
        return list(split)

    def _filled(self, name: str, inputs: ir.Value, missing: int) -> ir.Value:
        """Record zeros behind the last axis of an activation."""
        filled = self._pad(f"{name}.fill", inputs, missing)
        shape = inputs.shape
        if shape is not None and isinstance(shape[-1], int):
            filled.type = inputs.type
            filled.shape = ir.Shape([*shape[:-1], shape[-1] + missing])
        return filled

    def _pieces(self, name: str, outputs: Sequence[ir.Value], order: ColumnOrder) -> list[ir.Value]:
        """Put each layer together from runs of consecutive columns of the buckets."""
        pieces: dict[Run, ir.Value] = {}
        for number, output in enumerate(outputs):
            pieces |= self._cut(f"{name}.{number}", output, order, number)
        return [self._joined([pieces[run] for run in member]) for member in order.runs]

    def _cut(
        self, name: str, output: ir.Value, order: ColumnOrder, bucket: int
    ) -> dict[Run, ir.Value]:
        """Cut a bucket's output into the runs of it."""
        runs, pieces = order.runs_of_bucket(bucket), order.pieces_of_bucket(bucket)
        if not pieces:
            return dict.fromkeys(runs, output)
        if len(pieces) == 1:
            low = int(order.starts[bucket])
            values = (runs[0][0] - low, runs[0][1] - low, -1)
            limits = [
                self.constant(f"{name}{part}", np.array([value], np.int64))
                for part, value in zip(SLICE_SUFFIXES, values, strict=True)
            ]
            return {runs[0]: self.tape.op("Slice", [output, *limits])}
        lengths = np.array([stop - start for start, stop in pieces], np.int64)
        sizes = self.constant(f"{name}{PIECES_SUFFIX}", lengths)
        parts = self.tape.op_multi_out(
            "Split", [output, sizes], {"axis": -1}, num_outputs=len(pieces)
        )
        cut = dict(zip(pieces, parts, strict=True))
        return {
            run: self._joined([part for (a, b), part in cut.items() if run[0] <= a and b <= run[1]])
            for run in runs
        }

    def _gathered(
        self, name: str, joined: ir.Value, index: NDArray[np.int64], rank: int | None
    ) -> ir.Value:
        """Pick columns one by one.

        ONNX Runtime does it fastest with a Gather of the transposed: it copies whole rows, along
        the last axis single numbers. 90 x 768 on one AVX2 thread: 38 us, transposing included,
        and 157 us.
        """
        order = self.constant(name + ORDER_SUFFIX, index.astype(np.int32))
        if rank is None or self._target.runtime != "ort":
            return self.tape.op("Gather", [joined, order], {"axis": -1})
        rows = self.tape.op("Transpose", [joined], {"perm": [rank - 1, *range(rank - 1)]})
        gathered = self.tape.op("Gather", [rows, order], {"axis": 0})
        return self.tape.op("Transpose", [gathered], {"perm": [*range(1, rank), 0]})

    def _bucket(
        self, name: str, inputs: ir.Value, weight: QuantizedWeight, shape: tuple[int, int]
    ) -> ir.Value:
        """One width: codes of a shape [K, columns], blocks of scales along K, MatMul."""
        codes = stored_matrix(weight.codes, *shape, 0)
        if weight.bits == 16:
            halves = self._stored(name + HALVES_SUFFIX, codes)
            return self.tape.op("MatMul", [inputs, self._in_compute_type(halves, codes)])
        stored_type = code_type(self._target.containers[weight.bits])
        packed = self._stored(name + CODES_SUFFIX, codes.astype(stored_type))
        attributes, form, groups = {"axis": 1}, [shape[1]], weight.scales.shape[1]
        if weight.group_size is not None:
            attributes, form = {"axis": 0, "block_size": weight.group_size}, [groups, shape[1]]
        scales = stored_matrix(weight.scales, groups, shape[1], 1).reshape(form)
        scale = self._in_compute_type(self._stored(name + SCALES_SUFFIX, scales), scales)
        if weight.multipliers is not None:
            scale = self._multiplied(name, scale, weight.multipliers, shape[1])
        stored = [packed, scale]
        if weight.zero_points is not None:
            zeros = stored_matrix(weight.zero_points, groups, shape[1], 0).reshape(form)
            stored.append(self._stored(name + ZERO_POINTS_SUFFIX, zeros.astype(stored_type)))
        matrix = self.tape.op("DequantizeLinear", stored, attributes)
        return self.tape.op("MatMul", [inputs, matrix])

    def _multiplied(
        self, name: str, scale: ir.Value, multipliers: NDArray[np.uint8], columns: int
    ) -> ir.Value:
        """Multiply channel scales [1, columns] by their groups' multipliers; runtimes fold it."""
        factors = stored_matrix(multipliers, multipliers.shape[1], columns, 1)
        stored = self._stored(name + MULTIPLIERS_SUFFIX, factors)
        return self.tape.op("Mul", [scale, self._in_compute_type(stored, factors)])

    def _in_compute_type(self, value: ir.Value, stored: NDArray[np.generic]) -> ir.Value:
        if ir.DataType.from_numpy(stored.dtype) == self._compute:
            return value
        return self.tape.op("Cast", [value], {"to": self._compute})

    def _stored(self, name: str, value: NDArray[np.generic]) -> ir.Value:
        return self.tape.initializer(self._store(ir.Tensor(value, name=name)), name=name)

    def _joined(self, parts: Sequence[ir.Value]) -> ir.Value:
        return parts[0] if len(parts) == 1 else self.tape.op("Concat", parts, {"axis": -1})

    def _pad(self, name: str, outputs: ir.Value, missing: int) -> ir.Value:
        return self.tape.op("Pad", [outputs, *self._behind(name, missing)])

    def _behind(self, name: str, missing: int = 1) -> tuple[ir.Value, None, ir.Value]:
        """Record what Pad is told to append some numbers to the last axis."""
        pads = self.constant(f"{name}{PAD_SUFFIXES[0]}", np.array([0, missing], np.int64))
        axes = self.constant(f"{name}{PAD_SUFFIXES[1]}", np.array([-1], np.int64))
        return pads, None, axes

    def _zeros(self, name: str, inputs: ir.Value, channels: int) -> ir.Value:
        leading = self.tape.op("Shape", [inputs], {"start": 0, "end": -1})
        leading.dtype = ir.DataType.INT64
        width = self.constant(f"{name}.channels", np.array([channels], np.int64))
        shape = self.tape.op("Concat", [leading, width], {"axis": 0})
        zero = self.constant(f"{name}.zero", np.zeros(1, np.float32))
        return self.tape.op("Expand", [zero, shape])


def code_type(container: Container) -> np.dtype[Any]:
    """Return the type of a container's codes."""
    kind: np.dtype[Any] = np.dtype(_CODE_TYPES[container.bits])
    return kind


def stored_matrix(
    rows: NDArray[np.generic], height: int, columns: int, value: int
) -> NDArray[np.generic]:
    """Transpose [channels, n] to [height, columns], what is further filled with a value."""
    missing = ((0, columns - rows.shape[0]), (0, height - rows.shape[1]))
    padded = np.pad(rows, missing, constant_values=value) if np.any(missing) else rows
    return np.ascontiguousarray(padded.T)
