"""Error-compensating rounding: weights rounded one after another, each making up for those before.

With E = rounded - float weights, H of the inputs and G of the channels (`quantizer.moments`), the
action's expected squared deviation is about tr(G E H E^T). Once some weights are rounded, the
others have a best answer to their errors, and elimination gives it: along the inputs of a channel
as in GPTQ (Frantar et al. 2023) with an action-weighted H, and from channel to channel through G
(as with the two-sided Hessians of YAQA, Tseng et al. 2025). Channels go from few bits to many, so
that pruned and 2-bit channels are made up for by those that have the levels for it. numpy only.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.moments import LayerMoments
from qvla_export.quantizer.quantize import QuantizerSpec, at_steps, channel_steps, quantize_channels
from qvla_export.quantizer.rounding import RoundedLayer
from qvla_export.quantizer.scale_search import CODE_RANGE, Steps

# Added to the diagonals, as shares of their means: what is measured on few observations is not
# known well where it is small.
INPUT_DAMPING = 0.01
CHANNEL_DAMPING = 0.3
# Channels rounded together, as one step of the elimination.
_BLOCK_CHANNELS = 16
# Inputs whose errors those behind them answer together, by one product.
_BLOCK_INPUTS = 64
_SMALLEST = 1e-30
_NONE = np.zeros(0, np.int64)

_Matrix = NDArray[np.float64]


def round_layer(
    rows: NDArray[np.float32],
    widths: NDArray[np.int8],
    spec: QuantizerSpec,
    moments: LayerMoments,
    order: NDArray[np.int64],
    gone: NDArray[np.int64] = _NONE,
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
    """
    everything = np.concatenate([np.setdiff1d(np.arange(rows.shape[1]), order), order])
    matrix = moments.input_matrix(everything)
    lost = rows.shape[1] - len(order)
    work = _Work(rows[:, order], spec, _Inputs.of(matrix[lost:, lost:], spec))
    targets = rows[:, order].astype(np.float64)
    if spec.compensation != "none" and lost:
        # The best answer of the inputs that stay to those that are lost.
        damped = _with_damping(matrix, INPUT_DAMPING)
        answer = np.linalg.solve(damped[lost:, lost:], damped[lost:, :lost])
        targets += rows[:, everything[:lost]].astype(np.float64) @ answer.T
    if spec.compensation == "inputs and channels":
        _eliminate(work, targets, widths, moments, gone)
    else:
        for chosen in _alike(widths):
            work.round(chosen, targets[chosen], int(widths[chosen[0]]))
    return work.rounded_layer(rows.shape[1], order)


@dataclass(frozen=True)
class _Inputs:
    """Elimination along the inputs."""

    # Diagonal of H: weighs the errors of scales.  float32 [inputs]
    importance: NDArray[np.float32] | None
    # Inputs in the order of elimination; None rounds each weight by itself.  int64 [inputs]
    order: NDArray[np.int64] | None = None
    # Upper triangle U with H^-1 = U^T U, in that order.
    upper: _Matrix | None = None

    @staticmethod
    def of(matrix: _Matrix, spec: QuantizerSpec) -> "_Inputs":
        diagonal = np.diag(_with_damping(matrix, INPUT_DAMPING))
        importance = diagonal.astype(np.float32) if spec.weighted_scales else None
        if spec.compensation == "none":
            return _Inputs(importance)
        # What matters most has the most left to answer it.
        order = np.argsort(-diagonal, kind="stable")
        damped = _with_damping(matrix, INPUT_DAMPING)[np.ix_(order, order)]
        return _Inputs(importance, order, _upper(damped))


class _Work:
    """A layer's inputs that stay, in stored order, while its channels are rounded."""

    def __init__(self, rows: NDArray[np.float32], spec: QuantizerSpec, inputs: _Inputs) -> None:
        self.spec = spec
        self._inputs = inputs
        rules = spec.rules.values()
        groups = max([1, *(rule.groups(rows.shape[1]) for rule in rules)])
        self.codes = np.zeros(rows.shape, np.int8)
        self.halves: dict[int, NDArray[np.float16]] = {}
        self.scales = np.ones((len(rows), groups), np.float32)
        pointed = any(rule.zero_points for rule in rules)
        self.zero_points = np.zeros(self.scales.shape, np.int8) if pointed else None
        self.weights = np.zeros(rows.shape, np.float32)

    def round(self, chosen: NDArray[np.int64], targets: _Matrix, bits: int) -> _Matrix:
        """Round channels of one width to targets float64 [chosen, inputs]; return the weights."""
        if bits in CODE_RANGE:
            wanted = targets.astype(np.float32)
            steps = channel_steps(wanted, bits, self.spec, self._inputs.importance)
            if self._inputs.upper is not None:
                wanted = self._along_inputs(targets, steps, bits)
            made = at_steps(wanted, bits, self.spec, steps)
            self.codes[chosen] = made.codes
            groups = steps.scales.shape[1]
            self.scales[chosen, :groups] = steps.scales
            if self.zero_points is not None and steps.zero_points is not None:
                self.zero_points[chosen, :groups] = steps.zero_points
            self.weights[chosen] = made.dequantize()
        elif bits == 16:
            made = quantize_channels(targets.astype(np.float32), 16, self.spec)
            self.halves |= dict(zip(chosen.tolist(), made.codes, strict=True))
            self.weights[chosen] = made.dequantize()
        return self.weights[chosen].astype(np.float64)

    def _along_inputs(self, targets: _Matrix, steps: Steps, bits: int) -> NDArray[np.float32]:
        """Return the channels' rounded weights, input by input in the order of elimination."""
        order, upper = self._inputs.order, self._inputs.upper
        assert order is not None and upper is not None
        spread = steps.by_input(self.spec.rule(bits).group_size, targets.shape[1])
        scales, zeros = spread.scales[:, order].astype(np.float64), spread.zero_points
        # Codes less zero points, of each input and channel or of all.
        low, high = (np.full((len(order), 1), float(code)) for code in CODE_RANGE[bits])
        if zeros is not None:
            low, high = (code - zeros[:, order].T.astype(np.float64) for code in (low, high))
        left = targets[:, order].T.copy()
        for start in range(0, len(order), _BLOCK_INPUTS):
            stop = min(start + _BLOCK_INPUTS, len(order))
            errors = np.empty((stop - start, left.shape[1]))
            for place in range(start, stop):
                scale = scales[:, place]
                rounded = np.clip(np.rint(left[place] / scale), low[place], high[place]) * scale
                error = (left[place] - rounded) / upper[place, place]
                left[place] = rounded
                left[place + 1 : stop] -= np.outer(upper[place, place + 1 : stop], error)
                errors[place - start] = error
            left[stop:] -= upper[start:stop, stop:].T @ errors
        result = np.empty(targets.shape, np.float32)
        result[:, order] = left.T
        return result

    def rounded_layer(self, inputs: int, order: NDArray[np.int64]) -> RoundedLayer:
        """Return the layer in the natural order of all inputs, those that are lost included."""
        codes = np.zeros((len(self.codes), inputs), np.int8)
        codes[:, order] = self.codes
        halves = np.zeros((len(self.halves), inputs), np.float16)
        if len(halves):
            halves[:, order] = np.stack([self.halves[c] for c in sorted(self.halves)])
        return RoundedLayer(codes, halves, self.scales, self.zero_points)


def _eliminate(
    work: _Work,
    targets: _Matrix,
    widths: NDArray[np.int8],
    moments: LayerMoments,
    gone: NDArray[np.int64],
) -> None:
    """Round blocks of channels from few bits to many; all later ones answer each block's errors."""
    kept = np.setdiff1d(np.arange(len(widths)), gone)
    damped = _with_damping(moments.channel_matrix(kept), CHANNEL_DAMPING)
    # Of equal widths the most important first, as along the inputs.
    places = np.lexsort((-np.diag(damped), widths[kept]))
    order, upper = kept[places], _upper(damped[np.ix_(places, places)])
    left = targets[order]
    for start, stop in _blocks(widths[order]):
        chosen = order[start:stop]
        rounded = work.round(chosen, left[start:stop], int(widths[chosen[0]]))
        error = np.linalg.solve(upper[start:stop, start:stop].T, left[start:stop] - rounded)
        left[stop:] -= upper[start:stop, stop:].T @ error
    # Nobody reads them, but a plan has codes of all its channels.
    for places in _alike(widths[gone]):
        work.round(gone[places], targets[gone[places]], int(widths[gone[places[0]]]))


def _blocks(widths: NDArray[np.int8]) -> Iterator[tuple[int, int]]:
    """Runs of equal sorted widths, of at most `_BLOCK_CHANNELS`; pruned channels are one."""
    start = 0
    while start < len(widths):
        stop = start + int((widths[start:] == widths[start]).sum())
        if widths[start]:
            stop = min(stop, start + _BLOCK_CHANNELS)
        yield start, stop
        start = stop


def _alike(widths: NDArray[np.int8]) -> Iterator[NDArray[np.int64]]:
    for bits in np.unique(widths).tolist():
        yield np.flatnonzero(widths == bits)


def _with_damping(matrix: _Matrix, share: float) -> _Matrix:
    """Return the matrix with a share of its mean diagonal added to the diagonal."""
    addition = share * float(np.diag(matrix).mean()) + _SMALLEST
    return matrix + addition * np.eye(len(matrix))


def _upper(matrix: _Matrix) -> _Matrix:
    """Return the upper triangle U with matrix^-1 = U^T U."""
    factor: _Matrix = np.linalg.cholesky(np.linalg.inv(matrix)).T
    return factor
