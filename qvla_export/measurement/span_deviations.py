"""Deviations to first order with moments that are measured on the way, a span of layers at a time.

A layer's moments are there when its channels' errors are made, and gone when these have met the
gradients. Where all observations go through a policy at once, a span runs its passes twice.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from qvla_export.measurement.backward import WeightChanges
from qvla_export.measurement.layer_groups import Piece
from qvla_export.measurement.measure_moments import layer_moments
from qvla_export.measurement.moment_bounds import moment_sums
from qvla_export.measurement.sharded_sums import OnProgress, ShardedSums
from qvla_export.measurement.span_sweeps import SpanSweeps, add_passes
from qvla_export.measurement.standard_error import WHOLE
from qvla_export.measurement.whole_deviations import WholeDeviations
from qvla_export.quantizer.moments import LayerMoments, shares_of

Fed = Mapping[str, LayerMoments]
# Layers or pieces of them, and the layers' moments -> what each width adds to their weights.
FedChanges = Callable[[Sequence[Piece], Fed], WeightChanges]


def add_spans(
    sweeps: SpanSweeps,
    changes_of: FedChanges,
    sums: ShardedSums,
    on_progress: OnProgress | None = None,
) -> None:
    """Add this process's share of the squared deviations of all layers to sums.

    What an observation counts is found by a sweep before the others.

    A unit is a span on a batch; what is marked is not measured again.

    Args:
        sweeps: batches and spans.
        changes_of: what the quantizer adds to weights.
        sums: see `standard_error.empty_sums`; `WHOLE` is of all observations.
        on_progress: called with (units done, units in all).
    """
    count, layers = len(sweeps.batches), sweeps.stream.layers
    units = range(len(sweeps.spans) * count)
    if sums.resumed.issuperset(units):
        return
    shares = shares_of(sweeps.energies(sums.world))
    starts = np.cumsum([0, *(len(batch.observations) for batch in sweeps.batches)]).tolist()
    mine = sums.share(units)
    todo = sorted({unit // count for unit in mine})
    for span in todo:
        fed = {} if sweeps.at_once else dict(sweeps.moments(span, todo))
        for unit in (unit for unit in mine if unit // count == span):
            number = unit % count
            batch, own = sweeps.batches[number], slice(starts[number], starts[number + 1])
            counted = replace(batch, shares=None if shares is None else shares[own])
            of_batch = {**sums.values, WHOLE: sums.values[WHOLE][:, own]}
            whole = WholeDeviations(layers, counted, of_batch)
            if sweeps.at_once:
                _add_at_once(sweeps, span, todo, changes_of, whole)
            else:
                for group, passes in sweeps.stream.passes(batch, sweeps.spans[span]):
                    whole.add(group, passes, changes_of(group, fed))
            sums.mark(unit)
            if on_progress is not None:
                on_progress(sums.done(units), len(units))


def _add_at_once(
    sweeps: SpanSweeps,
    span: int,
    todo: Sequence[int],
    changes_of: FedChanges,
    whole: WholeDeviations,
) -> None:
    fed: dict[str, LayerMoments] = {}
    for _, group, passes in sweeps.groups(span, todo):
        layers = {piece.layer: sweeps.stream.layers[piece.layer] for piece in group}
        if not fed.keys() >= layers.keys():
            sums = moment_sums(layers, sweeps.settings)
            add_passes(passes, sums)
            fed |= {name: layer_moments(sums, name) for name in layers if name not in fed}
        whole.add(group, passes, changes_of(group, fed))
        for piece in group:
            if piece.stop == len(layers[piece.layer].weight):
                del fed[piece.layer]
