"""One layer while it is rounded: what its inputs answer each other, and the codes made so far.

`quantizer.compensation` decides which channels are rounded when. numpy only.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.quantizer.arrays import Array, Arrays
from qvla_export.quantizer.elimination import Blocking, Elimination, Levels, eliminate
from qvla_export.quantizer.moments import LayerMoments
from qvla_export.quantizer.quantize import (
    QuantizerSpec,
    at_steps,
    channel_steps,
    quantize_channels,
    with_steps,
)
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.quantizer.rounding import RoundedLayer
from qvla_export.quantizer.scale_search import CODE_RANGE, Steps
from qvla_export.quantizer.shares import Shares

# Added to the inputs' diagonal, as a share of its mean: what is measured on few observations is
# not known well where it is small.
INPUT_DAMPING = 0.01
# Channels that do not answer each other and go through the inputs together.
SECTION_CHANNELS = 512
_SMALLEST = 1e-30


@dataclass(frozen=True)
class LayerInputs:
    """Elimination along the inputs."""

    arrays: Arrays
    blocking: Blocking
    # Diagonal of H: weighs the errors of scales.  float32 [inputs]
    importance: NDArray[np.float32] | None
    # Inputs in the order of elimination; None rounds each weight by itself.  int64 [inputs]
    order: NDArray[np.int64] | None = None
    # In that order, what an input answers of what is missing before it; see `eliminate`.
    shares: Shares | None = None

    @staticmethod
    def of(
        moments: LayerMoments,
        order: NDArray[np.int64],
        spec: QuantizerSpec,
        elimination: Elimination,
        channels: int,
    ) -> "LayerInputs":
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
        addition = damping_of(diagonal, INPUT_DAMPING)
        diagonal += addition
        importance = diagonal.astype(np.float32) if spec.weighted_scales else None
        if spec.compensation == "none":
            return LayerInputs(arrays, blocking, importance)
        # What matters most has the most left to answer it.
        ranked = np.argsort(-diagonal, kind="stable")
        damped = moments.input_matrix(order[ranked], dtype=blocking.dtype)
        add_to_diagonal(damped, addition)
        factor = arrays.factor(damped)
        return LayerInputs(arrays, blocking, importance, ranked, Shares(factor, arrays))

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


class LayerWork:
    """A layer's inputs that stay, in stored order, while its channels are rounded."""

    def __init__(
        self,
        shape: tuple[int, ...],
        spec: QuantizerSpec,
        inputs: LayerInputs,
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
        assert inputs.shares is not None
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


def damping_of(diagonal: NDArray[np.float64], share: float) -> float:
    """Return what is added to a diagonal: a share of its mean; of none, next to nothing."""
    return share * float(diagonal.sum()) / max(len(diagonal), 1) + _SMALLEST


def add_to_diagonal(matrix: NDArray[Any], addition: float) -> None:
    """Add a number to each value of a diagonal, in place."""
    matrix.flat[:: len(matrix) + 1] += addition
