"""Columns of all widths side by side, and those that each layer reads of them. numpy only.

Where a runtime expands a layer's codes when it loads the graph, they are one matrix of integers,
and channels of 16 bits a second one of floats. Layers that share them read some columns each. What
picks columns, and what restores the order of channels behind a product, are constants of the graph:
`graph.expanded_to_onnx` records them, and a plan's bytes count them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.column_order import PAD_BYTES


@dataclass(frozen=True)
class SideColumns:
    """Columns of one matrix."""

    count: int
    # Column of each channel of all layers; -1 where it has none.  int64 [channels]
    places: NDArray[np.int64]

    @staticmethod
    def of_buckets(widths: NDArray[np.int8], buckets: Iterable[tuple[int, int]]) -> "SideColumns":
        """Return the columns of some buckets.

        Args:
            widths: of all layers.  int8 [channels]
            buckets: bits, and the number of columns that a bucket is stored with, in their order.
        """
        places, count = np.full(len(widths), -1, np.int64), 0
        for bits, stored in buckets:
            channels = np.flatnonzero(widths == bits)
            places[channels] = count + np.arange(len(channels))
            count += stored
        return SideColumns(count, places)

    def are_all(self, places: NDArray[np.int64]) -> bool:
        """Return whether these are all columns, in order, so that none need be picked."""
        return np.array_equal(places, np.arange(self.count))


@dataclass(frozen=True)
class MemberColumns:
    """What one layer reads of matrices, and how what comes out gets into its channels' order."""

    # Of each matrix, ascending by channel; none where the layer has no channel in it.
    # int64 [computed]
    places: tuple[NDArray[np.int64], ...]
    # Output that each channel reads, behind one another; pruned channels read one of zeros behind
    # all.  int64 [channels]
    index: NDArray[np.int64]
    # Whether there are outputs, and such zeros behind them.
    appends_zeros: bool

    @staticmethod
    def of_layer(matrices: Sequence[SideColumns], channels: slice) -> "MemberColumns":
        """Return what the layer of a stretch of channels reads."""
        found, start = [], 0
        index = np.full(channels.stop - channels.start, -1, np.int64)
        for matrix in matrices:
            places = matrix.places[channels]
            computed = np.flatnonzero(places >= 0)
            found.append(places[computed])
            index[computed] = start + np.arange(len(computed))
            start += len(computed)
        pruned = index < 0
        index[pruned] = start
        return MemberColumns(tuple(found), index, start > 0 and bool(pruned.any()))

    @property
    def is_empty(self) -> bool:
        """Whether all channels are pruned."""
        return not any(len(places) for places in self.places)

    @property
    def is_ordered(self) -> bool:
        """Whether outputs are in the order of the channels as they come."""
        return not self.appends_zeros and np.array_equal(self.index, np.arange(len(self.index)))

    def nbytes(self, matrices: Sequence[SideColumns]) -> int:
        """Return the bytes of the constants that pick columns and restore the order."""
        if self.is_empty:
            return 0
        pairs = zip(matrices, self.places, strict=True)
        picked = sum(4 * len(p) for matrix, p in pairs if len(p) and not matrix.are_all(p))
        order = 0 if self.is_ordered else 4 * len(self.index)
        return picked + order + (PAD_BYTES if self.appends_zeros else 0)
