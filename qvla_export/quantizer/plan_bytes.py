"""Bytes of a plan's constants: codes and scales, what restores an order, biases. numpy only."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from qvla_export.quantizer.column_order import PAD_BYTES, column_order
from qvla_export.quantizer.coupling import find_couplings
from qvla_export.quantizer.packed_storage import (
    StoredLayer,
    Widths,
    bucket_bytes,
    one_width_apart,
    side_by_side,
    stored_columns,
    stored_inputs,
    stored_layers,
)
from qvla_export.quantizer.side_columns import MemberColumns, SideColumns
from qvla_export.shared.target import Container


@dataclass(frozen=True)
class PackedForm:
    """How a graph holds planned layers, beside their containers."""

    # Width -> container of the target.
    containers: Mapping[int, Container]
    # Whether layers read rounded inputs: see `side_by_side`.
    rounded_inputs: bool = False
    # Whether the codes answer for what pruned hidden units put out; else the consumer's bias does.
    compensated: bool = False


def stored_bytes(widths: Widths, weights_per_channel: Mapping[str, int], form: PackedForm) -> int:
    """Return the bytes of all constants of planned layers; see `PlanBytes`."""
    return PlanBytes(weights_per_channel, form).of(widths)


@dataclass(frozen=True)
class PlanBytes:
    """Counts the bytes of one policy's plans.

    Plans that are tried one after another differ in a few layers, so that each layer's bytes are
    kept until its widths are others.
    """

    # Layer name -> weights of one channel.
    weights_per_channel: Mapping[str, int]
    form: PackedForm
    # Layers that are stored as one -> the last ones of these names, and their bytes.
    _latest: dict[tuple[str, ...], tuple[StoredLayer, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def of(self, widths: Widths) -> int:
        """Return the bytes of all constants of planned layers.

        Codes, scales, what restores the order of the channels, and biases that take up what pruned
        hidden units put out, in 32 bits: a graph that computes in 16 may hold them in half of that.

        Args:
            widths: see `stored_layers`.
        """
        layers = stored_layers(widths, self.weights_per_channel, self.form.containers)
        packed = sum(map(self._bytes_of, layers))
        biases = 0 if self.form.compensated else _bias_bytes(widths, self.weights_per_channel)
        return packed + biases

    def _bytes_of(self, layer: StoredLayer) -> int:
        earlier = self._latest.get(layer.names)
        if earlier is not None and _is_stored_alike(earlier[0], layer):
            return earlier[1]
        nbytes = _bucket_bytes_of(layer, self.form.containers) + _order_bytes(layer, self.form)
        self._latest[layer.names] = layer, nbytes
        return nbytes


def _is_stored_alike(one: StoredLayer, other: StoredLayer) -> bool:
    return (
        one.inputs == other.inputs
        and one.sizes == other.sizes
        and np.array_equal(one.widths, other.widths)
    )


def _bucket_bytes_of(layer: StoredLayer, containers: Mapping[int, Container]) -> int:
    return sum(
        bucket_bytes(int((layer.widths == bits).sum()), layer.inputs, containers[bits])
        for bits in np.unique(layer.widths).tolist()
        if bits
    )


def _order_bytes(layer: StoredLayer, form: PackedForm) -> int:
    """Bytes of what restores a layer's order, and of a Pad that fills its inputs up."""
    containers, sizes = form.containers, layer.sizes
    used = [bits for bits in np.unique(layer.widths).tolist()[::-1] if bits]
    if not used:
        return 0
    members = np.split(layer.widths, np.cumsum(sizes)[:-1])
    if len(sizes) > 1 and one_width_apart(members, containers):
        return 0
    counts = [int((layer.widths == bits).sum()) for bits in used]
    columns = [stored_columns(n, containers[bits]) for n, bits in zip(counts, used, strict=True)]
    if side_by_side(used, layer.inputs, containers, form.rounded_inputs):
        return _side_by_side_bytes(layer, used, columns)
    filled = stored_inputs(layer.inputs, layer.widths, containers) > layer.inputs
    return column_order(layer.widths, columns, sizes).nbytes + (PAD_BYTES if filled else 0)


def _side_by_side_bytes(layer: StoredLayer, used: list[int], columns: list[int]) -> int:
    """Bytes of the columns that each member reads of one matrix, and of its order behind it."""
    integers = [(bits, n) for bits, n in zip(used, columns, strict=True) if bits != 16]
    # Halves are stored as they are.
    halves = [(bits, int((layer.widths == bits).sum())) for bits in used if bits == 16]
    matrices = [SideColumns.of_buckets(layer.widths, some) for some in (integers, halves)]
    stops = np.cumsum(layer.sizes).tolist()
    members = zip(stops, layer.sizes, strict=True)
    return sum(
        MemberColumns.of_layer(matrices, slice(stop - size, stop)).nbytes(matrices)
        for stop, size in members
    )


def _bias_bytes(widths: Widths, weights_per_channel: Mapping[str, int]) -> int:
    """Bytes of float32 biases that take up what pruned units put out."""
    return 4 * sum(
        len(widths[coupling.consumer])
        for coupling in find_couplings(widths, weights_per_channel)
        if coupling.folds
    )
