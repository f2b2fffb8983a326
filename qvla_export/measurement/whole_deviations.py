"""Deviations of layers that are measured some channels at a time."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from qvla_export.measurement.backward import (
    Deviations,
    Pass,
    ProbedBatch,
    WeightChanges,
    deviations,
)
from qvla_export.measurement.layer_groups import Piece
from qvla_export.policies.layers import Layers


class WholeDeviations:
    """Deviations of layers that come in pieces; whole ones are added to sums."""

    def __init__(
        self, layers: Layers, batch: ProbedBatch, sums: Mapping[str, NDArray[np.float64]]
    ) -> None:
        self._layers, self._batch, self._sums = layers, batch, sums
        # Layer name -> observation -> the deviations of its channels so far.
        self._open: dict[str, list[list[Deviations]]] = {}

    def add(self, group: Sequence[Piece], passes: Iterable[Pass], changes: WeightChanges) -> None:
        """Add what the passes of a group say about its layers."""
        moved = []
        for item in passes:
            moved.append(deviations(item, changes))
            del item  # the next pass is made before the name is bound anew
        for piece in group:
            name, count = piece.layer, len(self._layers[piece.layer].weight)
            pieces = self._open.setdefault(name, [[] for _ in self._batch.observations])
            for of_observation, each in zip(pieces, moved, strict=True):
                of_observation.append(each[name])
            if piece.stop == count:
                whole = [Deviations.joined(one) for one in self._open.pop(name)]
                Deviations.of_batch(whole).add_to(self._sums, name, self._batch)
