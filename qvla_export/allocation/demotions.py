"""All demotions of all channels side by side: what each costs, adds and is allowed. numpy only.

Units get one width: channels by themselves, or all channels of some layers together. The methods
of `allocation.methods` choose among the demotions for `allocation.allocate`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

# The width of each unit, as an index into the table's widths.  int8 [units]
Levels = NDArray[np.int8]


@dataclass(frozen=True)
class PruningRule:
    """Limits on the step to 0 bits (section 3.3.2: dual-threshold and L0-style constraints).

    Raises:
        QvlaError: a share that is not within [0, 1], a threshold that is not a number >= 0.
    """

    # Largest share of a layer's channels that may be pruned.
    max_share_of_layer: float = 1.0
    # Largest share of all channels that may be pruned: the L0-style constraint.
    max_share: float = 1.0
    # Channels with a larger sensitivity at 0 bits are kept; None for no threshold.
    absolute_threshold: float | None = None
    # The same, as a multiple of the layer's mean sensitivity at 0 bits.
    relative_threshold: float | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            most = 1.0 if name.startswith("max_share") else float("inf")
            if value is not None and not 0 <= value <= most:
                raise QvlaError(
                    f"{name} of a pruning rule must be "
                    f"{'a share from 0 to 1' if most == 1 else 'a number >= 0'}, got {value}"
                )

    @property
    def has_caps(self) -> bool:
        """Whether a share is limited."""
        return self.max_share < 1 or self.max_share_of_layer < 1

    def to_json(self) -> dict[str, float]:
        """Return the limits that are set."""
        unset = asdict(PruningRule())
        return {name: value for name, value in asdict(self).items() if value != unset[name]}


@dataclass(frozen=True)
class DemotionTable:
    """All units side by side, at every allowed width."""

    # Names of the layers, and the layer of each channel.  int64 [channels]
    layers: tuple[str, ...]
    layer: NDArray[np.int64]
    # Weights of one channel of each layer.  int64 [layers]
    inputs: NDArray[np.int64]
    # From high to low; every unit starts at the first.
    widths: tuple[int, ...]
    # Sensitivity at each width.  float64 [widths, units]
    errors: NDArray[np.float64]
    # Bits that a channel of each layer stores at each width.  int64 [widths, layers]
    row_bits: NDArray[np.int64]
    # Whether the pruning rule allows 0 bits at all.  bool [units]
    prunable: NDArray[np.bool_]
    pruning: PruningRule
    # The unit each layer belongs to, where all its channels get one width; None where every
    # channel is a unit.  int64 [layers]
    unit_of_layer: NDArray[np.int64] | None = None

    @property
    def units(self) -> int:
        """Number of units."""
        return int(self.errors.shape[1])

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.layer)

    @property
    def members(self) -> NDArray[np.int64]:
        """Channels of each unit.  int64 [units]"""
        if self.unit_of_layer is None:
            return np.ones(self.channels, np.int64)
        return np.bincount(self.unit_of_layer, self.sizes, minlength=self.units).astype(np.int64)

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
        """Width itself, every channel alike.  int64 [widths, units]"""
        return self.of_units(np.repeat(np.array(self.widths)[:, None], len(self.layers), 1))

    def weight_bits(self) -> NDArray[np.int64]:
        """Width times weights.  int64 [widths, units]"""
        return self.of_units(np.array(self.widths)[:, None] * self.inputs)

    def stored_bits(self) -> NDArray[np.int64]:
        """Bits on the target, scales included.  int64 [widths, units]"""
        return self.of_units(self.row_bits)

    def of_units(self, of_channels: NDArray[Any]) -> NDArray[Any]:
        """Sum what one channel of each layer has, [widths, layers], over the units' channels."""
        if self.unit_of_layer is None:
            return of_channels[:, self.layer]
        summed = np.zeros((len(of_channels), self.units), of_channels.dtype)
        np.add.at(summed.T, self.unit_of_layer, (of_channels * self.sizes).T)
        return summed

    def error_of(self, levels: Levels) -> float:
        """Return the sum of the sensitivities."""
        chosen = np.take_along_axis(self.errors, levels[None].astype(np.int64), 0)
        return float(chosen.sum())

    def widths_of(self, levels: Levels) -> dict[str, NDArray[np.int8]]:
        """Return layer name -> int8 [channels]."""
        if self.unit_of_layer is not None:
            levels = levels[self.unit_of_layer][self.layer]
        chosen = np.array(self.widths, np.int8)[levels]
        parts = np.split(chosen, np.cumsum(self.sizes)[:-1])
        return dict(zip(self.layers, parts, strict=True))

    def by_layers(self, unit_of_layer: NDArray[np.int64]) -> "DemotionTable":
        """Return the same table with whole layers as units.

        A unit may be pruned where all its channels may, and not at all under a cap on a layer's.

        Args:
            unit_of_layer: int64 [layers], every unit from 0 on occurs.
        """
        unit, units = unit_of_layer[self.layer], int(unit_of_layer.max()) + 1
        errors = np.empty((len(self.widths), units))
        for row, summed in zip(self.errors, errors, strict=True):
            summed[:] = np.bincount(unit, row, units)
        prunable = np.bincount(unit, ~self.prunable, units) == 0
        if self.pruning.max_share_of_layer < 1:
            prunable[:] = False
        return replace(self, errors=errors, prunable=prunable, unit_of_layer=unit_of_layer)


def demotion_table(
    sensitivities: Sensitivities, target: Target, widths: Sequence[int], pruning: PruningRule
) -> DemotionTable:
    """Lay out a policy's sensitivities, every channel a unit.

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
