"""How the outputs of a layer's buckets get back into the order of its channels. numpy only.

Buckets hold a layer's channels by falling width. Where a few runs of neighbouring columns make the
channels' order, they are cut out and joined; else an index picks every channel. Both are constants
of the graph: `graph.buckets_to_onnx` records them, and a plan's bytes count them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

# Pieces up to which Split + Concat is used instead of a Gather. Two layers that share an order
# (gate and up of a gated MLP) need at most 4 + 16.
_MOST_PIECES = 24
# Columns from one to before another.
Run = tuple[int, int]


@dataclass(frozen=True)
class ColumnOrder:
    """Columns of all buckets side by side, and the one that each channel reads."""

    # First column of each bucket, and the number of all; the zeros of pruned channels included.
    # int64 [buckets + 1]
    starts: NDArray[np.int64]
    # int64 [channels]
    index: NDArray[np.int64]
    # Whether the last bucket gets a further column of zeros, which pruned channels read.
    appends_zeros: bool
    # Channels of the layers that are stored as this one.
    sizes: tuple[int, ...]

    @cached_property
    def _cuts(self) -> NDArray[np.int64]:
        """Where a channel's column does not follow the one before it, or another layer begins."""
        bucket = np.searchsorted(self.starts, self.index, side="right")
        breaks = (np.diff(self.index) != 1) | (np.diff(bucket) != 0)
        breaks[np.cumsum(self.sizes)[:-1] - 1] = True
        return np.flatnonzero(breaks) + 1

    @property
    def picks(self) -> bool:
        """Whether channels are picked one by one: there are too many runs to join."""
        return len(self._cuts) + 1 > _MOST_PIECES

    @property
    def runs(self) -> tuple[tuple[Run, ...], ...]:
        """Return the columns of each stored layer, as runs within one bucket each."""
        firsts = np.concatenate([[0], self._cuts])
        lasts = np.concatenate([self._cuts, [len(self.index)]]) - 1
        member = np.searchsorted(np.cumsum(self.sizes), firsts, side="right")
        found: list[list[Run]] = [[] for _ in self.sizes]
        for layer, first, last in zip(member, firsts, lasts, strict=True):
            found[layer].append((int(self.index[first]), int(self.index[last]) + 1))
        return tuple(map(tuple, found))

    def runs_of_bucket(self, bucket: int) -> list[Run]:
        """Return the runs within a bucket, ascending, each once."""
        low, high = int(self.starts[bucket]), int(self.starts[bucket + 1])
        return sorted({run for layer in self.runs for run in layer if low <= run[0] < high})

    def pieces_of_bucket(self, bucket: int) -> list[Run]:
        """Return the pieces that a bucket is split into so that runs of it can be joined.

        None where no run begins or ends within it; one where it has a single run.
        """
        low, high = int(self.starts[bucket]), int(self.starts[bucket + 1])
        runs = self.runs_of_bucket(bucket)
        if not runs or runs == [(low, high)]:
            return []
        if len(runs) == 1:
            return runs
        return list(itertools.pairwise(sorted({low, high, *(x for run in runs for x in run)})))

    @property
    def nbytes(self) -> int:
        """Bytes of the constants that restore the order."""
        found = PAD_BYTES if self.appends_zeros else 0
        if self.picks:
            members = 8 * len(self.sizes) if len(self.sizes) > 1 else 0
            return found + 4 * len(self.index) + members
        for bucket in range(len(self.starts) - 1):
            pieces = self.pieces_of_bucket(bucket)
            # A Slice has a start, a stop and an axis, a Split the length of every piece.
            found += 8 * (3 if len(pieces) == 1 else len(pieces))
        return found


# Of a Pad behind the last axis: how much before and behind, and the axis, in 64 bits each.
PAD_BYTES = 24


def column_order(
    widths: NDArray[np.int8], columns: Sequence[int], sizes: Sequence[int]
) -> ColumnOrder:
    """Return how a layer's channels are found again.

    Args:
        widths: of layers side by side, not all 0.  int8 [channels]
        columns: what each bucket is stored with, by falling width.
        sizes: channels of each of the layers.
    """
    index = np.empty(len(widths), np.int64)
    starts, zeros = [0], None
    for bits, filled in zip(np.unique(widths[widths > 0])[::-1].tolist(), columns, strict=True):
        channels = np.flatnonzero(widths == bits)
        index[channels] = starts[-1] + np.arange(len(channels))
        if filled > len(channels):
            zeros = starts[-1] + len(channels)
        starts.append(starts[-1] + filled)
    pruned = widths == 0
    appends = zeros is None and bool(pruned.any())
    index[pruned] = starts[-1] if zeros is None else zeros
    starts[-1] += appends
    return ColumnOrder(np.array(starts), index, appends, tuple(sizes))
