"""Layers whose channels are each other's: what an MLP produces and consumes. numpy only.

A hidden unit of an MLP is a channel of its producers (fc1; gate_proj and up_proj) and an input of
its consumer (fc2; down_proj). Where a producer of the unit has 0 bits the unit is constant: it
leaves both, and the constant goes into the consumer's bias. The units that stay are ordered by
width, so that the producers' buckets come out in the order in which the consumer reads them.

The consumer's groups of weights that share a scale are groups of the units in this order. It
depends on the plan's widths alone, and fake quantization and export both take it from here.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.layer_names import mlp_producers
from qvla_export.quantizer.quantize import QuantizerSpec, fake_quantize
from qvla_export.quantizer.scale_search import Steps


@dataclass(frozen=True)
class Coupling:
    """Producers and consumer of one MLP, and the units that stay."""

    producers: tuple[str, ...]
    consumer: str
    # Units that stay, in stored order: by falling width of the first producer, then the second.
    # At least one.  int64 [kept]
    order: NDArray[np.int64]
    # Units before pruning.
    units: int

    @property
    def constant_units(self) -> NDArray[np.int64]:
        """Constant units, ascending.  int64 [units - kept]"""
        return np.setdiff1d(np.arange(self.units), self.order)

    @property
    def folds(self) -> bool:
        """Whether constant units may put out something, which goes into the consumer's bias.

        With two producers a unit is their product: where one is 0, it is 0.
        """
        return len(self.producers) == 1 and len(self.order) < self.units


def find_couplings(
    widths: Mapping[str, NDArray[np.int8]], weights_per_channel: Mapping[str, int]
) -> tuple[Coupling, ...]:
    """Return the couplings of planned layers, found by their names and sizes.

    Args:
        widths: layer name -> int8 [channels].
        weights_per_channel: layer name -> weights of one channel.
    """
    found = []
    for consumer in widths:
        producers, units = mlp_producers(consumer), weights_per_channel[consumer]
        if producers and all(len(widths.get(name, ())) == units for name in producers):
            order = _order(np.stack([widths[name] for name in producers]))
            found.append(Coupling(producers, consumer, order, units))
    return tuple(found)


def fake_quantize_coupled(
    rows: NDArray[np.float32],
    widths: NDArray[np.int8],
    spec: QuantizerSpec,
    coupling: Coupling,
    kept: dict[int, Steps] | None = None,
) -> NDArray[np.float32]:
    """Return the weights an engine computes with in a coupling's consumer.

    Columns of removed units keep their float weights, of pruned channels too: the engine adds
    their constant contribution to the bias.

    Args:
        rows: the consumer's weights, float32 [channels, units].
        widths: int8 [channels].
        spec: the plan's quantizer.
        coupling: of which it is the consumer.
        kept: see `quantize_channels`.
    """
    result = rows.copy()
    ordered = rows[:, coupling.order]
    result[:, coupling.order] = fake_quantize(ordered, widths, spec, kept=kept)
    return result


def _order(widths: NDArray[np.int8]) -> NDArray[np.int64]:
    """Units that no producer prunes, by falling widths [producers, units]; ties stay in order."""
    kept = np.flatnonzero(widths.min(axis=0) > 0)
    if len(kept) == 0:
        # A matrix without columns is no matrix: one constant unit stays.
        return np.zeros(1, np.int64)
    keys = -widths[::-1, kept].astype(np.int64)
    return kept[np.lexsort(keys)]
