"""Error-compensating rounding: weights rounded one after another, each making up for those before.

With E = rounded - float weights, H of the inputs and G of the channels (`quantizer.moments`), the
action's expected squared deviation is about tr(G E H E^T). Once some weights are rounded, the
others have a best answer to their errors, and elimination gives it: along the inputs of a channel
as in GPTQ (Frantar et al. 2023) with an action-weighted H, and from channel to channel through G
(as with the two-sided Hessians of YAQA, Tseng et al. 2025). Channels go from few bits to many, so
that pruned and 2-bit channels are made up for by those that have the levels for it. numpy only.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.arrays import Array, Arrays
from qvla_export.quantizer.elimination import Blocking, Elimination, Levels, eliminate
from qvla_export.quantizer.moments import LayerMoments
from qvla_export.quantizer.quantize import (
    QuantizedWeight,
    QuantizerSpec,
    at_steps,
    channel_steps,
    quantize_channels,
    with_steps,
)
from qvla_export.quantizer.rounding import RoundedLayer
from qvla_export.quantizer.scale_search import CODE_RANGE, Steps

# Added to the diagonals, as shares of their means: what is measured on few observations is not
# known well where it is small.
INPUT_DAMPING = 0.01
CHANNEL_DAMPING = 0.3
# Channels that do not answer each other and go through the inputs together.
SECTION_CHANNELS = 512
_SMALLEST = 1e-30
_NONE = np.zeros(0, np.int64)
_NUMPY = Elimination()


def round_layer(
    rows: NDArray[np.float32],
    widths: NDArray[np.int8],
    spec: QuantizerSpec,
    moments: LayerMoments,
    order: NDArray[np.int64],
    gone: NDArray[np.int64] = _NONE,
    elimination: Elimination = _NUMPY,
) -> RoundedLayer:
    """Round a layer's weights.

    Args:
        rows: float32 [channels, inputs].
        widths: int8 [channels].
        spec: how.
        moments: of the layer.
        order: inputs that stay in the graph, as it stores them; groups of weights that share a
            scale are groups of these. The others are lost.  int64 [kept]
        gone: channels whose outputs leave the graph: whoever reads them answers it, so the layer's
            other channels do not.  int64 [n]
        elimination: array operations and blocks.
    """
    inputs = _Inputs.of(moments, order, spec, elimination, len(rows))
    targets = inputs.put(rows[:, order])
    lost = np.setdiff1d(np.arange(rows.shape[1]), order)
    if spec.compensation != "none" and len(lost):
        targets += inputs.put(rows[:, lost]) @ _answer(moments, order, lost, inputs)
    work = _Work(rows.shape, spec, inputs, order)
    if spec.compensation == "inputs and channels":
        _eliminate(work, targets, widths, moments, gone)
    else:
        for chosen in _alike(widths):
            work.round(chosen, targets[inputs.places(chosen)], int(widths[chosen[0]]))
    return work.rounded_layer()


def rounded_alone(
    rows: NDArray[np.float32],
    widths: Sequence[int],
    spec: QuantizerSpec,
    moments: LayerMoments,
    elimination: Elimination = _NUMPY,
) -> Iterator[NDArray[np.float32]]:
    """Round a layer's channels to one width after another; they do not answer each other.

    Args:
        rows: float32 [channels, inputs], in the order that the graph stores.
        widths: of all channels; each gives a result.
        spec: how.
        moments: of the layer.
        elimination: array operations and blocks.

    Yields:
        The weights an engine computes with.  float32 [channels, inputs]
    """
    alone = spec if spec.compensation == "none" else replace(spec, compensation="inputs")
    order, every = np.arange(rows.shape[1]), np.arange(len(rows))
    inputs = _Inputs.of(moments, order, alone, elimination, len(rows))
    targets = inputs.put(rows)
    for bits in widths:
        work = _Work(rows.shape, alone, inputs, order)
        yield inputs.get(work.round(every, targets, bits))


@dataclass(frozen=True)
class _Inputs:
    """Elimination along the inputs."""

    arrays: Arrays
    blocking: Blocking
    # Diagonal of H: weighs the errors of scales.  float32 [inputs]
    importance: NDArray[np.float32] | None
    # Inputs in the order of elimination; None rounds each weight by itself.  int64 [inputs]
    order: NDArray[np.int64] | None = None
    # In that order, what an input answers of what is missing before it; see `eliminate`.
    shares: Array = None

    @staticmethod
    def of(
        moments: LayerMoments,
        order: NDArray[np.int64],
        spec: QuantizerSpec,
        elimination: Elimination,
        channels: int,
    ) -> "_Inputs":
        """Find the order of some inputs and factor their moments.

        Args:
            moments: of the layer.
            order: inputs that stay, as the graph stores them.  int64 [kept]
            spec: how.
            elimination: array operations and blocks.
            channels: of the whole layer.
        """
        arrays, blocking = elimination.arrays, elimination.blocking_of(channels)
        diagonal = moments.input_diagonal(order)
        addition = _damping(diagonal, INPUT_DAMPING)
        diagonal += addition
        importance = diagonal.astype(np.float32) if spec.weighted_scales else None
        if spec.compensation == "none":
            return _Inputs(arrays, blocking, importance)
        # What matters most has the most left to answer it.
        ranked = np.argsort(-diagonal, kind="stable")
        damped = moments.input_matrix(order[ranked])
        _add_to_diagonal(damped, addition)
        factor = arrays.factor(damped, blocking.dtype)
        return _Inputs(arrays, blocking, importance, ranked, factor / factor.diagonal())

    def put(self, values: NDArray[Any]) -> Array:
        """Return values as what is computed with."""
        return self.arrays.put(values.astype(self.blocking.dtype))

    def places(self, numbers: NDArray[np.int64]) -> Array:
        """Return numbers of channels as an index."""
        return self.arrays.put(numbers)

    def get(self, array: Array) -> NDArray[np.float32]:
        """Return what was computed."""
        values: NDArray[np.float32] = self.arrays.get(array).astype(np.float32)
        return values


class _Work:
    """A layer's inputs that stay, in stored order, while its channels are rounded."""

    def __init__(
        self,
        shape: tuple[int, ...],
        spec: QuantizerSpec,
        inputs: _Inputs,
        order: NDArray[np.int64],
    ) -> None:
        self.inputs = inputs
        self._spec, self._order = spec, order
        rules = spec.rules.values()
        groups = max([1, *(rule.groups(len(order)) for rule in rules)])
        # In the natural order of all inputs, those that are lost included.
        self._codes = np.zeros(shape, np.int8)
        self._halves: dict[int, NDArray[np.float16]] = {}
        self._scales = np.ones((shape[0], groups), np.float32)
        pointed = any(rule.zero_points for rule in rules)
        self._zero_points = np.zeros(self._scales.shape, np.int8) if pointed else None
        leveled = any(rule.two_level for rule in rules)
        self._multipliers = np.ones(self._scales.shape, np.uint8) if leveled else None

    def round(
        self,
        chosen: NDArray[np.int64],
        targets: Array,
        bits: int,
        channels_factor: Array | None = None,
    ) -> Array:
        """Round channels of one width; return their weights as an engine has them.

        Args:
            chosen: which.  int64 [chosen]
            targets: [chosen, inputs]
            bits: their width.
            channels_factor: see `elimination.eliminate`; None where they do not answer each other.
        """
        rounded = targets * 0
        step = SECTION_CHANNELS if channels_factor is None else len(chosen)
        for start in range(0, len(chosen), step):
            some = slice(start, start + step)
            if bits == 16:
                rounded[some] = self._in_halves(chosen[some], targets[some])
            elif bits:
                steps, made = self._coded(targets[some], bits, channels_factor)
                self._keep(chosen[some], steps, made)
                rounded[some] = self.inputs.put(made.dequantize())
        return rounded

    def rounded_layer(self) -> RoundedLayer:
        """Return the layer."""
        halves = np.zeros((len(self._halves), self._codes.shape[1]), np.float16)
        for row, channel in zip(halves, sorted(self._halves), strict=True):
            row[self._order] = self._halves[channel]
        return RoundedLayer(self._codes, halves, self._scales, self._zero_points, self._multipliers)

    def _in_halves(self, chosen: NDArray[np.int64], targets: Array) -> Array:
        made = quantize_channels(self.inputs.get(targets), 16, self._spec)
        self._halves |= dict(zip(chosen.tolist(), made.codes, strict=True))
        return self.inputs.put(made.dequantize())

    def _coded(
        self, targets: Array, bits: int, channels_factor: Array | None
    ) -> tuple[Steps, QuantizedWeight]:
        wanted = self.inputs.get(targets)
        steps = channel_steps(wanted, bits, self._spec, self.inputs.importance)
        if self.inputs.order is None:
            return steps, at_steps(wanted, bits, self._spec, steps)
        codes = self._along_inputs(targets, steps, bits, self.inputs.order, channels_factor)
        return steps, with_steps(codes, bits, self._spec, steps)

    def _keep(self, chosen: NDArray[np.int64], steps: Steps, made: QuantizedWeight) -> None:
        groups = steps.scales.shape[1]
        self._codes[np.ix_(chosen, self._order)] = made.codes
        self._scales[chosen, :groups] = steps.scales
        if self._zero_points is not None and made.zero_points is not None:
            self._zero_points[chosen, :groups] = made.zero_points
        if self._multipliers is not None and made.multipliers is not None:
            self._multipliers[chosen, :groups] = made.multipliers

    def _along_inputs(
        self,
        targets: Array,
        steps: Steps,
        bits: int,
        order: NDArray[np.int64],
        channels_factor: Array | None,
    ) -> NDArray[Any]:
        """Return the codes that elimination gives.  [channels, inputs]"""
        inputs, (low, high) = self.inputs, map(float, CODE_RANGE[bits])
        spread = steps.by_input(self._spec.rule(bits).group_size, targets.shape[1])
        scales = np.ascontiguousarray(spread.scales[:, order].T.astype(inputs.blocking.dtype))
        levels = Levels(scales, low, high)
        if spread.zero_points is not None:
            zeros = np.ascontiguousarray(spread.zero_points[:, order].T.astype(scales.dtype))
            levels = Levels(scales, low - zeros, high - zeros)
        ranked = targets[:, inputs.places(order)].T
        rounded = eliminate(
            ranked, levels, inputs.shares, channels_factor, inputs.arrays, inputs.blocking
        )
        codes = np.empty(targets.shape, np.int8)
        codes[:, order] = inputs.arrays.get(rounded).T
        return codes if spread.zero_points is None else codes + spread.zero_points


def _answer(
    moments: LayerMoments, order: NDArray[np.int64], lost: NDArray[np.int64], inputs: _Inputs
) -> Array:
    """Return the best answer of the inputs that stay to those that are lost.  [lost, kept]"""
    damped = moments.input_matrix(order)
    everything = moments.input_diagonal(np.arange(len(moments.mean)))
    _add_to_diagonal(damped, _damping(everything, INPUT_DAMPING))
    across = moments.input_matrix(order, lost)
    answer = inputs.arrays.solve(inputs.arrays.put(damped), inputs.arrays.put(across))
    return inputs.put(inputs.arrays.get(answer)).T


def _eliminate(
    work: _Work,
    targets: Array,
    widths: NDArray[np.int8],
    moments: LayerMoments,
    gone: NDArray[np.int64],
) -> None:
    """Round blocks of channels from few bits to many; all later ones answer each block's errors."""
    inputs = work.inputs
    kept = np.setdiff1d(np.arange(len(widths)), gone)
    addition = _damping(moments.channel_diagonal(kept), CHANNEL_DAMPING)
    for group in moments.channel_groups(kept):
        # Of equal widths the most important first, as along the inputs.
        order = group[np.lexsort((-moments.channel_diagonal(group), widths[group]))]
        damped = moments.channel_matrix(order)
        _add_to_diagonal(damped, addition)
        factor = inputs.arrays.factor(damped, inputs.blocking.dtype)
        ordered = targets[inputs.places(order)]
        missing = ordered * 0
        for start, stop in _blocks(widths[order], inputs.blocking.channels):
            chosen, own = order[start:stop], factor[start:stop, start:stop]
            wanted = ordered[start:stop]
            answered = wanted
            if start:
                before = factor[:start, start:stop].T @ missing[:start]
                answered = wanted + inputs.arrays.solve(own.T, before)
            rounded = work.round(chosen, answered, int(widths[chosen[0]]), own)
            missing[start:stop] = wanted - rounded
    # Nobody reads them, but a plan has codes of all its channels.
    for some in _alike(widths[gone]):
        work.round(gone[some], targets[inputs.places(gone[some])], int(widths[gone[some[0]]]))


def _blocks(widths: NDArray[np.int8], largest: int) -> Iterator[tuple[int, int]]:
    """Runs of equal sorted widths, of at most `largest`; pruned channels are one."""
    start = 0
    while start < len(widths):
        stop = start + int((widths[start:] == widths[start]).sum())
        if widths[start]:
            stop = min(stop, start + largest)
        yield start, stop
        start = stop


def _alike(widths: NDArray[np.int8]) -> Iterator[NDArray[np.int64]]:
    for bits in np.unique(widths).tolist():
        yield np.flatnonzero(widths == bits)


def _damping(diagonal: NDArray[np.float64], share: float) -> float:
    """Return what is added to a diagonal: a share of its mean; of none, next to nothing."""
    return share * float(diagonal.sum()) / max(len(diagonal), 1) + _SMALLEST


def _add_to_diagonal(matrix: NDArray[np.float64], addition: float) -> None:
    matrix.flat[:: len(matrix) + 1] += addition
