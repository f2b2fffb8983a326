"""One linear map of rounded inputs as ONNX nodes: codes of all widths as one int8 matrix.

What is stored is what `buckets_to_onnx` stores. A runtime expands it once, when it loads the graph:
codes times their groups' multipliers are int8 numbers, channels of all widths lie side by side in
their own order, and a layer is one product of integers, with one scale a channel behind it. ONNX
Runtime folds all that comes before DequantizeLinear, and multiplies as it does for 8-bit weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.buckets import BucketedWeight
from qvla_export.graph.buckets_to_onnx import (
    CODES_SUFFIX,
    COLUMNS_SUFFIX,
    HALVES_SUFFIX,
    MULTIPLIERS_SUFFIX,
    SCALES_SUFFIX,
    BucketEmitter,
    code_type,
    stored_matrix,
)
from qvla_export.graph.passes.merge import members_of
from qvla_export.quantizer.packed_storage import stored_columns
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.quantizer.side_columns import MemberColumns, SideColumns


@dataclass(frozen=True)
class _Columns:
    """Constants of several buckets side by side."""

    # Codes [inputs, columns], and of each column its scale [columns]; None for floats.
    matrix: ir.Value
    scales: ir.Value | None
    side: SideColumns


class ExpandedEmitter(BucketEmitter):
    """Records the nodes of layers whose inputs are rounded to 8 bits; see `BucketEmitter`.

    Channels of 16 bits, where there are any, are a second product.
    """

    def emit(
        self, name: str, inputs: ir.Value, weight: BucketedWeight, sizes: Sequence[int]
    ) -> list[ir.Value]:
        """Record inputs [..., K] -> outputs [..., n], one for each layer that is merged in this.

        Args: as of `BucketEmitter.emit`.
        """
        integers = [part for part in weight.weights if part.bits != 16]
        if not integers:
            return super().emit(name, inputs, weight, sizes)
        found = [self._expanded(name, weight, integers)]
        found += [self._halves(name, weight, part) for part in weight.weights if part.bits == 16]
        names = [name] if len(sizes) == 1 else members_of(name)
        starts = np.cumsum([0, *sizes])
        return [
            self._member(member, inputs, found, slice(int(start), int(start) + size))
            for member, start, size in zip(names, starts, sizes, strict=False)
        ]

    def _member(
        self, name: str, inputs: ir.Value, found: Sequence[_Columns], channels: slice
    ) -> ir.Value:
        """Record the product of one layer's channels, restoring what is pruned."""
        member = MemberColumns.of_layer([columns.side for columns in found], channels)
        if member.is_empty:
            return self._zeros(name, inputs, len(member.index))
        read = [pair for pair in zip(found, member.places, strict=True) if len(pair[1])]
        outputs = [self._product(name, inputs, *pair) for pair in read[:-1]]
        # ONNX Runtime appends zeros to the weights once, when it loads the graph.
        at_load = member.appends_zeros and self._target.runtime == "ort"
        outputs.append(self._product(name, inputs, *read[-1], appends_zeros=at_load))
        if member.appends_zeros and not at_load:
            outputs[-1] = self._pad(name, outputs[-1], 1)
        joined = self._joined(outputs)
        if member.is_ordered:
            return joined
        return self._gathered(
            name, joined, member.index, None if inputs.shape is None else inputs.shape.rank()
        )

    def _product(
        self,
        name: str,
        inputs: ir.Value,
        columns: _Columns,
        places: NDArray[np.int64],
        appends_zeros: bool = False,
    ) -> ir.Value:
        """Record the product with some columns, and maybe with one of zeros behind them."""
        matrix, scales = columns.matrix, columns.scales
        if not columns.side.are_all(places):
            suffix = HALVES_SUFFIX if scales is None else ""
            chosen = self.constant(name + suffix + COLUMNS_SUFFIX, places.astype(np.int32))
            matrix = self.tape.op("Gather", [matrix, chosen], {"axis": 1})
            scales = scales and self.tape.op("Gather", [scales, chosen], {"axis": 0})
        if appends_zeros:
            behind = self._behind(name)
            matrix = self.tape.op("Pad", [matrix, *behind])
            scales = scales and self.tape.op("Pad", [scales, *behind])
        if scales is not None:
            matrix.dtype = ir.DataType.INT8  # which passes that follow look at
            matrix = self.tape.op("DequantizeLinear", [matrix, scales], {"axis": 1})
        return self.tape.op("MatMul", [inputs, matrix])

    def _halves(self, name: str, weight: BucketedWeight, part: QuantizedWeight) -> _Columns:
        stored = stored_matrix(part.codes, part.codes.shape[1], len(part.codes), 0)
        constant = self._stored(f"{name}.b16{HALVES_SUFFIX}", stored)
        side = SideColumns.of_buckets(weight.buckets.widths, [(16, len(part.codes))])
        return _Columns(self._in_compute_type(constant, stored), None, side)

    def _expanded(
        self, name: str, weight: BucketedWeight, parts: Sequence[QuantizedWeight]
    ) -> _Columns:
        """Record the int8 columns of all widths side by side, and their scales."""
        matrices, scales, buckets = [], [], []
        for part in parts:
            filled = stored_columns(len(part.codes), self._target.containers[part.bits])
            buckets.append((part.bits, filled))
            matrices.append(self._expanded_codes(f"{name}.b{part.bits}", part, filled))
            stored = stored_matrix(part.scales, 1, filled, 1).reshape(-1)
            constant = self._stored(f"{name}.b{part.bits}{SCALES_SUFFIX}", stored)
            scales.append(self._in_compute_type(constant, stored))
        side = SideColumns.of_buckets(weight.buckets.widths, buckets)
        if len(parts) == 1:
            return _Columns(matrices[0], scales[0], side)
        matrix = self.tape.op("Concat", matrices, {"axis": 1})
        return _Columns(matrix, self.tape.op("Concat", scales, {"axis": 0}), side)

    def _expanded_codes(self, name: str, part: QuantizedWeight, columns: int) -> ir.Value:
        """Record a bucket's codes times their multipliers.  int8 [inputs, columns]"""
        inputs = part.codes.shape[1]
        codes = stored_matrix(part.codes, inputs, columns, 0)
        packed = codes.astype(code_type(self._target.containers[part.bits]))
        stored = self._stored(name + CODES_SUFFIX, packed)
        if part.multipliers is None or part.group_size is None:
            narrow = packed.dtype != np.int8
            return self.tape.op("Cast", [stored], {"to": ir.DataType.INT8}) if narrow else stored
        # Of what ONNX Runtime folds this takes the least memory, 2 bytes a weight until a graph is
        # loaded: its products of integers have 32 bits and more. A code over the reciprocal of a
        # multiplier is within 0.1 of a whole number, so what comes out is exact.
        halves = self.tape.op("Cast", [stored], {"to": ir.DataType.FLOAT16})
        groups = part.multipliers.shape[1]
        factors = self._stored(
            name + MULTIPLIERS_SUFFIX, stored_matrix(part.multipliers, groups, columns, 1)
        )
        wide = self.tape.op("Cast", [factors], {"to": ir.DataType.FLOAT})
        over = self.tape.op("Reciprocal", [wide])
        step = self.tape.op("Cast", [over], {"to": ir.DataType.FLOAT16})
        return self.tape.op(
            "QuantizeLinear",
            [halves, step],
            {"axis": 0, "block_size": part.group_size, "output_dtype": ir.DataType.INT8},
        )
