"""Elimination: channels rounded input by input, what comes later making up for what came before.

Rounding channel c at input i leaves an error, which the channel's later inputs answer through the
factor of their moments and later channels at that input through theirs. So a weight waits for
those before it in its row and in its column, and for no others: channels are taken in blocks, and
while one block rounds an input, the block after it rounds the input before that. One step of the
loop does this for all blocks; halves of the inputs pass what is missing on by one product. Array
operations are an argument (`quantizer.arrays`), numpy alone is imported.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.arrays import Array, Arrays, Float, NumpyArrays


@dataclass(frozen=True)
class Blocking:
    """How many weights are rounded together, and in which arithmetic."""

    # Channels whose scales are chosen at once, from targets that answer all channels before them.
    channels: int
    # Of these, that are rounded in one block: they do not answer each other.
    block: int
    # Inputs rounded one after another before one product passes on what is missing.
    inputs: int
    # Of the elimination; matrices are factored in float64.
    dtype: Float


# Layers of no more channels are rounded finely: scales for 16 channels at a time, in float64. On
# 520 and more, random and strongly correlated, coarse blocks and float32 cost up to 2 % of the
# squared error (of 2048: 0.1 %), and take a fourth of the time.
_FEW_CHANNELS = 512
_FINE = Blocking(16, 16, 64, np.float64)
_WIDE = Blocking(256, 16, 64, np.float32)


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
    shares: Array,
    channels_factor: Array | None,
    arrays: Arrays,
    blocking: Blocking,
) -> Array:
    """Round weights one after another and return the whole numbers.

    Of moments M = R R^T with R upper, place i answers best what is missing before it with the
    shares R[:i, i] / R[i, i]: the linear feedback of QuIP (Chee et al. 2023), equal to GPTQ's,
    without an inverse.

    Args:
        targets: [inputs, channels], inputs in the order of elimination.
        levels: of each.
        shares: of the inputs; what is on the diagonal or below does not count.  [inputs, inputs]
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

    Columns are channels in blocks, the last block first: then the weights that a step rounds, one
    input of each block, lie at equal distances in memory.
    """

    def __init__(
        self,
        targets: Array,
        levels: Levels,
        shares: Array,
        channels_factor: Array | None,
        arrays: Arrays,
        blocking: Blocking,
    ) -> None:
        self._arrays, self._shares, self._inputs = arrays, shares, blocking.inputs
        count = targets.shape[1]
        self._size = count if channels_factor is None else min(blocking.block, count)
        self._blocks = -(-count // self._size)
        # Channels that fill the last block up are zero, and stay it.
        places = np.arange(self._blocks * self._size).reshape(self._blocks, -1)[::-1].reshape(-1)
        self._filled = arrays.put(np.flatnonzero(places < count))
        self._channels = arrays.put(places[places < count])
        self._targets = self._laid_out(targets, 0)
        self._left = self._targets + 0
        self._scales = self._laid_out(arrays.put(levels.scales), 1)
        self._low, self._high = (
            self._laid_out(arrays.put(bound), 0) if isinstance(bound, np.ndarray) else bound
            for bound in (levels.low, levels.high)
        )
        # What the rounded weights miss of what they were to be after answering other channels.
        self._gaps = arrays.zeros(self._targets.shape, self._targets)
        self._levels = arrays.zeros(self._targets.shape, self._targets)
        self._answers = None
        if channels_factor is not None and self._blocks > 1:
            self._answers = self._answers_of(channels_factor)

    def run(self) -> Array:
        """Round all inputs."""
        self._round(0, len(self._targets))
        result = self._arrays.zeros((len(self._targets), len(self._channels)), self._targets)
        result[:, self._channels] = self._levels[:, self._filled]
        return result

    def _laid_out(self, values: Array, rest: float) -> Array:
        shape = len(values), self._blocks * self._size
        result = self._arrays.zeros(shape, values) + rest
        result[:, self._filled] = values[:, self._channels]
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
        if stop - start <= self._inputs:
            self._round_few(start, stop)
            return
        middle = start + self._inputs * -(-(stop - start) // (2 * self._inputs))
        self._round(start, middle)
        shares = self._shares[start:middle, middle:stop]
        self._left[middle:stop] += shares.T @ self._gaps[start:middle]
        self._round(middle, stop)

    def _round_few(self, start: int, stop: int) -> None:
        """Round inputs [start, stop) one by one: block b the input t - b in step t.

        Rows of zeros before and after them keep all blocks busy in all steps.
        """
        arrays, blocks, size = self._arrays, self._blocks, self._size
        count, width, before = stop - start, blocks * size, blocks - 1
        inside = slice(before, before + count)
        steps = np.arange(count + before)[:, None] + np.arange(blocks)
        rows_of, blocks_of = arrays.put(steps), arrays.put(np.arange(blocks))

        def tile(values: Array, rest: float = 0) -> Array:
            padded = arrays.zeros((count + 2 * blocks, width), self._targets) + rest
            padded[inside] = values[start:stop]
            return padded

        def by_step(values: Array) -> Array:
            """[rows, columns] -> [steps, blocks, block]"""
            return values.reshape(-1, blocks, size)[rows_of, blocks_of]

        def of_step(values: Array, step: int) -> Array:
            """Return a view of what `by_step` has.  [blocks, block]"""
            flat = values.reshape(-1)[step * width : (step + blocks) * width + width]
            return flat.reshape(blocks, width + size)[:, :size]

        left, missing = tile(self._left), arrays.zeros((count + 2 * blocks, width), self._targets)
        targets, scales = by_step(tile(self._targets)), by_step(tile(self._scales, 1))
        low, high = (
            [bound] * len(steps) if isinstance(bound, float) else by_step(tile(bound))
            for bound in (self._low, self._high)
        )
        levels, gaps = arrays.zeros(targets.shape, left), arrays.zeros(targets.shape, left)
        later, rest = self._later(start, stop), left[inside].reshape(count, blocks, size)
        for step in range(len(steps)):
            rows, scale = slice(step, step + blocks), scales[step]
            value, wanted = of_step(left, step), targets[step]
            if self._answers is not None:
                answers = missing[rows].reshape(blocks, 1, width) @ self._answers
                answers = answers.reshape(blocks, size)
                value, wanted = value + answers, wanted + answers
            level = arrays.clip(arrays.rint(value / scale), low[step], high[step])
            weight = level * scale
            gap = wanted - weight
            levels[step], gaps[step] = level, gap
            if self._answers is not None:
                of_step(missing, step)[:] = targets[step] - weight
            first = max(step - before, 0)
            rest[first:] += later[first:, rows, None] * gap
        for values, found in ((self._levels, levels), (self._gaps, gaps)):
            padded = arrays.zeros((count + 2 * blocks, blocks, size), found)
            padded[rows_of, blocks_of] = found
            values[start:stop] = padded[inside].reshape(count, width)

    def _later(self, start: int, stop: int) -> Array:
        """Return the shares of inputs [start, stop) in those before them.

        [inputs, before + inputs + before], zero outside
        """
        before, count = self._blocks - 1, stop - start
        result = self._arrays.zeros((count, count + 2 * before), self._shares)
        own = self._arrays.above_diagonal(self._shares[start:stop, start:stop])
        result[:, before : before + count] = own.T
        return result
