"""Elimination: channels rounded input by input, what comes later making up for what came before.

Rounding channel c at input i leaves an error, which the channel's later inputs answer through the
factor of their moments and later channels at that input through theirs. So a weight waits for
those before it in its row and in its column, and for no others: channels are taken in blocks,
inputs in runs, and while one block rounds a run, the block after it rounds the run before that.
One step does this for all blocks: what other blocks and earlier runs miss comes by products, and
only the inputs of a run go one by one. Panels of runs, and halves of all inputs, pass what is
missing on by one product. Array operations are an argument (`quantizer.arrays`), numpy alone is
imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.arrays import Array, Arrays, Float, NumpyArrays
from qvla_export.quantizer.shares import Shares


@dataclass(frozen=True)
class Blocking:
    """How many weights are rounded together, and in which arithmetic."""

    # Channels whose scales are chosen at once, from targets that answer all channels before them.
    channels: int
    # Of these, that are rounded in one block: they do not answer each other.
    block: int
    # Inputs that a block rounds one after another while the others wait for what it misses.
    inputs: int
    # Inputs that all blocks go through before one product passes on what is missing.
    panel: int
    # Of the elimination and of factors.
    dtype: Float


# Layers of no more channels are rounded finely: scales for 16 channels at a time, in float64. On
# 520 to 2048, random and strongly correlated, coarse blocks and float32 cost up to 2 % of the
# squared error, and take a fourth of the time.
_FEW_CHANNELS = 512
_FINE = Blocking(16, 16, 16, 64, np.float64)
_WIDE = Blocking(256, 16, 16, 512, np.float32)


@dataclass(frozen=True)
class Elimination:
    """By what and how weights are eliminated."""

    arrays: Arrays = field(default_factory=NumpyArrays)
    # None chooses by the size of a layer.
    blocking: Blocking | None = None

    def blocking_of(self, channels: int) -> Blocking:
        """Return the blocking of a layer with so many channels."""
        return self.blocking or (_FINE if channels <= _FEW_CHANNELS else _WIDE)


@dataclass(frozen=True)
class Levels:
    """What channels may be rounded to: whole numbers within bounds, times a scale."""

    # [inputs, channels]
    scales: NDArray[Any]
    # Lowest and highest code less the zero point: numbers, or [inputs, channels].
    low: NDArray[Any] | float
    high: NDArray[Any] | float


def eliminate(
    targets: Array,
    levels: Levels,
    shares: Shares,
    channels_factor: Array | None,
    arrays: Arrays,
    blocking: Blocking,
) -> Array:
    """Round weights one after another and return the whole numbers.

    Args:
        targets: [inputs, channels], inputs in the order of elimination.
        levels: of each.
        shares: of the inputs.
        channels_factor: R of the channels', in their order; None where they do not answer each
            other.  [channels, channels]
        arrays: operations.
        blocking: blocks of channels that do not answer each other, inputs taken together.

    Returns:
        Codes less their zero points, whole numbers.  [inputs, channels]
    """
    return _Waves(targets, levels, shares, channels_factor, arrays, blocking).run()


class _Waves:
    """Channels on their way through the inputs.

    Columns are channels in blocks, the last block first: then what a step rounds, some inputs of
    each block, lies at equal distances in memory.
    """

    def __init__(
        self,
        targets: Array,
        levels: Levels,
        shares: Shares,
        channels_factor: Array | None,
        arrays: Arrays,
        blocking: Blocking,
    ) -> None:
        self._arrays, self._shares, self._blocking = arrays, shares, blocking
        self._inputs, count = targets.shape
        self._size = count if channels_factor is None else min(blocking.block, count)
        self._blocks = -(-count // self._size)
        self._count = count
        # What is left of the targets, the targets themselves, and their scales.
        self._given = self._laid_out((targets, 0), (targets, 0), (arrays.put(levels.scales), 1))
        self._left = self._given[0]
        self._bounds = [
            self._laid_out((arrays.put(bound), 0))
            if isinstance(bound, np.ndarray)
            else arrays.zeros((), targets) + bound
            for bound in (levels.low, levels.high)
        ]
        # What the rounded weights miss of the targets, of the targets with the answers to other
        # channels, and their levels.
        self._made = arrays.zeros(self._given.shape, targets)
        self._missing, self._gaps, self._levels = self._made
        self._buffers: dict[int, tuple[Array, list[tuple[Array, ...]]]] = {}
        self._answers = None
        if channels_factor is not None and self._blocks > 1:
            self._answers = self._answers_of(channels_factor)

    def run(self) -> Array:
        """Round all inputs."""
        self._round(0, self._inputs)
        result = self._arrays.zeros((self._inputs, self._count), self._left)
        for stored, channels in self._places():
            result[:, channels] = self._levels[: self._inputs, stored]
        return result

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Yield where a block is stored, and which channels it has."""
        for number in range(self._blocks):
            start = number * self._size
            stop = min(start + self._size, self._count)
            stored = (self._blocks - 1 - number) * self._size
            yield slice(stored, stored + stop - start), slice(start, stop)

    def _laid_out(self, *filled: tuple[Array, float]) -> Array:
        """Return arrays as they are stored, each with what fills its blocks and runs up.

        A row more lets views of the last run end in the array.  [arrays, rows, columns]
        """
        length, width = self._blocking.inputs, self._blocks * self._size
        rows = -(-self._inputs // length) * length + 1
        result = self._arrays.zeros((len(filled), rows, width), filled[0][0])
        for whole, (values, rest) in zip(result, filled, strict=True):
            whole += rest
            for stored, channels in self._places():
                whole[: self._inputs, stored] = values[:, channels]
        return result

    def _answers_of(self, factor: Array) -> Array:
        """Return what each block adds for each unit that channels before it miss.

        R[before, block] R[block, block]^-1 of the block's columns.  [blocks, columns, block]
        """
        size, last = self._size, self._blocks - 1
        result = self._arrays.zeros((self._blocks, self._blocks * size, size), factor)
        for number in range(1, self._blocks):
            own = slice(number * size, (number + 1) * size)
            answer = self._arrays.solve(factor[own, own].T, factor[: own.start, own].T).T
            for other in range(number):
                rows = slice((last - other) * size, (last - other + 1) * size)
                answered = answer[other * size : (other + 1) * size]
                result[last - number, rows, : answered.shape[1]] = answered
        return result

    def _round(self, start: int, stop: int) -> None:
        """Round inputs [start, stop), which answer all inputs before them."""
        panel = self._blocking.panel
        if stop - start <= panel:
            self._round_panel(start, stop)
            return
        middle = start + panel * -(-(stop - start) // (2 * panel))
        self._round(start, middle)
        shares = self._shares.matrix[start:middle, middle:stop]
        self._left[middle:stop] += shares.T @ self._gaps[start:middle]
        self._round(middle, stop)

    def _round_panel(self, start: int, stop: int) -> None:
        """Round inputs [start, stop) in runs: block b the run t - b in step t."""
        blocks, length = self._blocks, self._blocking.inputs
        runs, wide = -(-(stop - start) // length), self._size if blocks > 1 else 1
        shares = self._shares.of_runs(start, stop, length, wide)
        for step in range(runs + blocks - 1):
            # Of the stored blocks, those that have a run in this step, and their runs.
            first = max(0, blocks - 1 - step)
            working = slice(first, min(blocks, runs + blocks - 1 - step))
            run = step - (blocks - 1) + first
            those = slice(run, run + working.stop - first)
            self._round_runs(start, working, those, shares)

    def _round_runs(
        self,
        start: int,
        working: slice,
        runs: slice,
        shares: tuple[Array, Array],
    ) -> None:
        """Round a run of each of some blocks.

        Args:
            start: first input of the panel.
            working: blocks, as stored.
            runs: of the panel, one for each of them.
            shares: of the panel, see `Shares.of_runs`.
        """
        length, size, width = self._blocking.inputs, self._size, self._blocks * self._size
        count, each = working.stop - working.start, length * width + size
        first = (start + runs.start * length) * width + working.start * size

        def own(values: Array) -> Array:
            """Return views of each block's run.  [arrays, length, blocks, block]"""
            flat = values.reshape(len(values), -1)[:, first : first + count * each]
            wide = flat.reshape(-1, count, each)[:, :, : length * width]
            return wide.reshape(-1, count, length, width)[:, :, :, :size].swapaxes(1, 2)

        buffers, rows = self._buffers_of(count)
        buffers[:3] = own(self._given)
        value, wanted, scale, level = buffers
        before, within = shares[0][runs], shares[1][:, :, runs]
        answers = 0
        if self._answers is not None:
            inputs = slice(start + runs.start * length, start + runs.stop * length)
            missing = self._missing[inputs].reshape(count, length, width)
            answers = (missing @ self._answers[working]).swapaxes(0, 1)
            value += answers
            wanted += answers
        known = (runs.stop - 1) * length
        if known:
            gaps = self._gaps[start : start + known].reshape(known, self._blocks, size)
            value += (before[:, :, :known] @ gaps.swapaxes(0, 1)[working]).swapaxes(0, 1)
        bounds = [own(some)[0] if some.shape else [some] * length for some in self._bounds]
        for place, (now, target, unit, whole, later) in enumerate(rows):
            self._arrays.nearest(now, unit, bounds[0][place], bounds[1][place], whole)
            later += within[place, place + 1 :] * (target - whole * unit)
        gap = wanted - level * scale
        missed, gaps, levels = own(self._made)
        gaps[:], levels[:] = gap, level
        if self._answers is not None:
            missed[:] = gap - answers

    def _buffers_of(self, count: int) -> tuple[Array, list[tuple[Array, ...]]]:
        """Return where runs of some blocks are rounded, and its views, the same each time.

        Returns:
            Values, targets, scales and levels [4, length, count, block]; of each input those, and
            the values of the inputs after it.
        """
        if count not in self._buffers:
            length = self._blocking.inputs
            whole = self._arrays.zeros((4, length, count, self._size), self._left)
            rows = [(*whole[:, place], whole[0, place + 1 :]) for place in range(length)]
            self._buffers[count] = whole, rows
        return self._buffers[count]
