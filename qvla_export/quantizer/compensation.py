"""Error-compensating rounding: weights rounded one after another, each making up for those before.

With E = rounded - float weights, H of the inputs and G of the channels (`quantizer.moments`), the
action's expected squared deviation is about tr(G E H E^T). Once some weights are rounded, the
others have a best answer to their errors, and elimination gives it: along the inputs of a channel
as in GPTQ (Frantar et al. 2023) with an action-weighted H, and from channel to channel through G
(as with the two-sided Hessians of YAQA, Tseng et al. 2025). Channels go from few bits to many, so
that pruned and 2-bit channels are made up for by those that have the levels for it. numpy only.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.arrays import Array
from qvla_export.quantizer.elimination import Elimination
from qvla_export.quantizer.layer_work import (
    INPUT_DAMPING,
    LayerInputs,
    LayerWork,
    add_to_diagonal,
    damping_of,
)
from qvla_export.quantizer.moments import LayerMoments
from qvla_export.quantizer.quantize import QuantizerSpec
from qvla_export.quantizer.rounding import RoundedLayer

# Added to the channels' diagonal, as `INPUT_DAMPING` is to that of the inputs.
CHANNEL_DAMPING = 0.3
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
    inputs = LayerInputs.of(moments, order, spec, elimination, len(rows))
    targets = inputs.put(rows[:, order])
    lost = np.setdiff1d(np.arange(rows.shape[1]), order)
    if spec.compensation != "none" and len(lost):
        targets += inputs.put(rows[:, lost]) @ _answer(moments, order, lost, inputs)
    work = LayerWork(rows.shape, spec, inputs, order)
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
    inputs = LayerInputs.of(moments, order, alone, elimination, len(rows))
    targets = inputs.put(rows)
    for bits in widths:
        work = LayerWork(rows.shape, alone, inputs, order)
        yield inputs.get(work.round(every, targets, bits))


def _answer(
    moments: LayerMoments, order: NDArray[np.int64], lost: NDArray[np.int64], inputs: LayerInputs
) -> Array:
    """Return the best answer of the inputs that stay to those that are lost.  [lost, kept]"""
    damped = moments.input_matrix(order)
    everything = moments.input_diagonal(np.arange(len(moments.mean)))
    add_to_diagonal(damped, damping_of(everything, INPUT_DAMPING))
    across = moments.input_matrix(order, lost)
    answer = inputs.arrays.solve(inputs.arrays.put(damped), inputs.arrays.put(across))
    return inputs.put(inputs.arrays.get(answer)).T


def _eliminate(
    work: LayerWork,
    targets: Array,
    widths: NDArray[np.int8],
    moments: LayerMoments,
    gone: NDArray[np.int64],
) -> None:
    """Round blocks of channels from few bits to many; all later ones answer each block's errors."""
    inputs = work.inputs
    kept = np.setdiff1d(np.arange(len(widths)), gone)
    addition = damping_of(moments.channel_diagonal(kept), CHANNEL_DAMPING)
    for group in moments.channel_groups(kept):
        # Of equal widths the most important first, as along the inputs.
        order = group[np.lexsort((-moments.channel_diagonal(group), widths[group]))]
        damped = moments.channel_matrix(order, inputs.blocking.dtype)
        add_to_diagonal(damped, addition)
        factor = inputs.arrays.factor(damped)
        ordered = targets[inputs.places(order)]
        missing = ordered * 0
        for start, stop in _blocks(widths[order], inputs.blocking.channels):
            chosen, own = order[start:stop], factor[start:stop, start:stop]
            wanted = ordered[start:stop]
            answered = wanted
            if start:
                # Solved for few channels, not for all inputs.
                shares = inputs.arrays.solve(own.T, factor[:start, start:stop].T)
                answered = wanted + shares @ missing[:start]
            rounded = work.round(chosen, answered, int(widths[chosen[0]]), own)
            missing[start:stop] = wanted - rounded
    # Nobody reads them, but a plan has codes of all its channels.
    for some in _alike(widths[gone]):
        work.round(gone[some], targets[inputs.places(gone[some])], int(widths[gone[some[0]]]))


def _blocks(widths: NDArray[np.int8], largest: int) -> Iterator[tuple[int, int]]:
    """Even shares, of at most `largest`, of equal sorted widths; pruned channels are one."""
    for bits in np.unique(widths).tolist():
        start, stop = np.searchsorted(widths, [bits, bits + 1]).tolist()
        shares = -(-(stop - start) // largest) if bits else 1
        ends = np.linspace(start, stop, shares + 1).astype(int).tolist()
        yield from itertools.pairwise(ends)


def _alike(widths: NDArray[np.int8]) -> Iterator[NDArray[np.int64]]:
    for bits in np.unique(widths).tolist():
        yield np.flatnonzero(widths == bits)
