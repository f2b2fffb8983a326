"""All demotions of all channels side by side: what each costs, adds and is allowed. numpy only.

`qvla_export.greedy` and `qvla_export.hull` choose among them for `qvla_export.allocation`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.sensitivity import Sensitivities
from qvla_export.target import Target

# The width of each channel, as an index into the table's widths.  int8 [channels]
Levels = NDArray[np.int8]


@dataclass(frozen=True)
class PruningRule:
    """Limits on the step 2 -> 0 (section 3.3.2: dual-threshold and L0-style constraints)."""

    # Largest share of a layer's channels that may be pruned.
    max_share_of_layer: float = 1.0
    # Largest share of all channels that may be pruned: the L0-style constraint.
    max_share: float = 1.0
    # Channels with a larger sensitivity at 0 bits are kept; None for no threshold.
    absolute_threshold: float | None = None
    # The same, as a multiple of the layer's mean sensitivity at 0 bits.
    relative_threshold: float | None = None

    @property
    def has_caps(self) -> bool:
        """Whether a share is limited."""
        return self.max_share < 1 or self.max_share_of_layer < 1


@dataclass(frozen=True)
class DemotionTable:
    """The channels of all layers side by side, at every allowed width."""

    # Names of the layers, and the layer of each channel.  int64 [channels]
    layers: tuple[str, ...]
    layer: NDArray[np.int64]
    # Weights of one channel of each layer.  int64 [layers]
    inputs: NDArray[np.int64]
    # From high to low; the first is 16.
    widths: tuple[int, ...]
    # Sensitivity at each width.  float64 [widths, channels]
    errors: NDArray[np.float64]
    # Bits that a channel of each layer stores at each width.  int64 [widths, layers]
    row_bits: NDArray[np.int64]
    # Whether the thresholds allow pruning.  bool [channels]
    prunable: NDArray[np.bool_]
    pruning: PruningRule

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.layer)

    @property
    def prunes(self) -> bool:
        """Whether 0 bits are among the widths."""
        return self.widths[-1] == 0

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Channels of each layer.  int64 [layers]"""
        return np.bincount(self.layer, minlength=len(self.layers))

    @property
    def float16_bits(self) -> int:
        """Bits of all weights in float16."""
        return int(16 * (self.inputs * self.sizes).sum())

    def nominal_bits(self) -> NDArray[np.int64]:
        """Width itself, every channel alike.  int64 [widths, channels]"""
        return self.of_channels(np.repeat(np.array(self.widths)[:, None], len(self.layers), 1))

    def weight_bits(self) -> NDArray[np.int64]:
        """Width times weights.  int64 [widths, channels]"""
        return self.of_channels(np.array(self.widths)[:, None] * self.inputs)

    def stored_bits(self) -> NDArray[np.int64]:
        """Bits on the target, scales included.  int64 [widths, channels]"""
        return self.of_channels(self.row_bits)

    def of_channels(self, of_layers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Repeat [widths, layers] for each layer's channels."""
        return of_layers[:, self.layer]

    def error_of(self, levels: Levels) -> float:
        """Return the sum of the sensitivities."""
        chosen = np.take_along_axis(self.errors, levels[None].astype(np.int64), 0)
        return float(chosen.sum())

    def widths_of(self, levels: Levels) -> dict[str, NDArray[np.int8]]:
        """Return layer name -> int8 [channels]."""
        chosen = np.array(self.widths, np.int8)[levels]
        parts = np.split(chosen, np.cumsum(self.sizes)[:-1])
        return dict(zip(self.layers, parts, strict=True))


def demotion_table(
    sensitivities: Sensitivities, target: Target, widths: Sequence[int], pruning: PruningRule
) -> DemotionTable:
    """Lay out a policy's sensitivities.

    Args:
        sensitivities: of the policy.
        target: whose containers cost what.
        widths: allowed widths from high to low, all measured or 16.
        pruning: limits on 0 bits.
    """
    names = tuple(sensitivities.values)
    sizes = np.array([sensitivities.values[name].shape[1] for name in names])
    layer = np.repeat(np.arange(len(names)), sizes)
    inputs = np.array([sensitivities.weights_per_channel[name] for name in names], np.int64)
    errors = np.empty((len(widths), len(layer)))
    for i, bits in enumerate(widths):
        errors[i] = np.concatenate([sensitivities.at(name, bits) for name in names])
    row_bits = [
        [target.containers[bits].row_bits(int(n)) if bits else 0 for n in inputs] for bits in widths
    ]
    return DemotionTable(
        layers=names,
        layer=layer,
        inputs=inputs,
        widths=tuple(widths),
        errors=errors,
        row_bits=np.array(row_bits, np.int64),
        prunable=_may_be_pruned(errors[-1], layer, sizes, pruning),
        pruning=pruning,
    )


def _may_be_pruned(
    errors: NDArray[np.float64],
    layer: NDArray[np.int64],
    sizes: NDArray[np.int64],
    rule: PruningRule,
) -> NDArray[np.bool_]:
    """Apply both thresholds to the sensitivities at 0 bits.  bool [channels]"""
    allowed = np.ones(len(errors), dtype=bool)
    if rule.absolute_threshold is not None:
        allowed &= errors <= rule.absolute_threshold
    if rule.relative_threshold is not None:
        means = np.bincount(layer, errors) / sizes
        allowed &= errors <= rule.relative_threshold * means[layer]
    return allowed
