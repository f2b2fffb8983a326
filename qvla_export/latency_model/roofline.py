"""Roofline prediction of what one action costs on a target in a power mode. numpy only.

Of each product the slower of two counts, reading its weights and writing its outputs or its
multiplications; where a runtime expands codes beforehand that comes on top, and so do launches.
Layers that share an input are one product for each width (`graph.passes.merge`), constant
hidden units are gone (`qvla_export.quantizer.coupling`). Everything here is a prediction, never a
measurement.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.latency_model.kernel_rates import KernelRates
from qvla_export.latency_model.network_shape import (
    AttentionShape,
    LayerShape,
    NetworkShape,
    PartShape,
)
from qvla_export.latency_model.product_forms import FormOnTarget
from qvla_export.quantizer.coupling import find_couplings
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import ActivationSupport, PowerMode, ProductForm, Target

# Layer name -> width of each channel.  int8 [channels]
Widths = Mapping[str, NDArray[np.int8]]

_INT8_BYTES = 1


@dataclass(frozen=True)
class PartPrediction:
    """Predicted milliseconds of a part, all its runs together."""

    name: str
    runs: int
    total_ms: float
    # What `total_ms` is made of: products of weights, attention, and kernels between them.
    weights_ms: float
    attention_ms: float
    between_ms: float


@dataclass(frozen=True)
class LatencyPrediction:
    """Predicted milliseconds of one action."""

    parts: tuple[PartPrediction, ...]
    # The truth is expected between total_ms / uncertainty and total_ms * uncertainty.
    uncertainty: float

    @property
    def total_ms(self) -> float:
        """Of all parts."""
        return sum(part.total_ms for part in self.parts)


@dataclass(frozen=True)
class _Product:
    """Layers of one input: a MatMul for each width."""

    rows: int
    inputs: int
    # Width -> channels computed with it; 0 bits never.
    channels: Mapping[int, int]
    # Outputs in all, pruned ones included.
    outputs: int
    # Whether the channels' order must be restored.
    reordered: bool
    # Whether these are quantized layers, so that 8-bit activations reach them.
    planned: bool
    # See `LayerShape`.
    overlap: int


@dataclass(frozen=True)
class _Units:
    """Hidden units of planned MLPs that stay."""

    # Producer -> the units it computes.  int64 [kept]
    produced: Mapping[str, NDArray[np.int64]]
    # Consumer -> how many it reads.
    read: Mapping[str, int]


@dataclass(frozen=True)
class LatencyModel:
    """Predicts one network on one target in one power mode."""

    network: NetworkShape
    target: Target
    mode: PowerMode
    rates: KernelRates
    # Of planned layers.
    form: ProductForm = "dequantized"

    def weight_bytes(self, widths: Widths, activations: ActivationSupport = "none") -> float:
        """Return the bytes of the planned layers in memory, as products of this form read them."""
        form = self._form(True)
        total = 0.0
        for name, values in widths.items():
            inputs, counts = self.network.layers[name][1], np.bincount(values, minlength=17)
            for bits in np.flatnonzero(counts[1:]) + 1:
                total += counts[bits] * form.row_bits(inputs, int(bits), activations) / 8
        return float(total)

    def predict(
        self, widths: Widths | None = None, activations: ActivationSupport = "none"
    ) -> LatencyPrediction:
        """Predict the milliseconds of one action.

        Args:
            widths: layer name -> int8 [channels], as in a plan; layers not named, and all layers
                for None, are in the target's compute type.
            activations: the plan's setting, "none" or "int8".

        Raises:
            QvlaError: widths of a layer the network does not have.
        """
        shapes = self.network.layers
        widths = widths or {}
        for name, values in widths.items():
            if name not in shapes or len(values) != shapes[name][0]:
                raise QvlaError(
                    f"the plan gives {len(values)} widths to layer {name!r}; the network has "
                    f"{shapes.get(name, 'no such layer')}. Predict the policy the plan is for."
                )
        units = _units(widths, {name: shapes[name][1] for name in widths})
        parts = tuple(self._part(part, widths, units, activations) for part in self.network.parts)
        return LatencyPrediction(parts, self.rates.uncertainty_of(self.mode, activations))

    def channel_ms(
        self, layer: str, widths: tuple[int, ...], activations: ActivationSupport = "none"
    ) -> NDArray[np.float64]:
        """Return what one channel of a layer adds at each width, launches aside.

        The sum over channels differs from `predict` by launches, whole tiles and the inputs of
        later layers that constant units save.

        Returns:
            Milliseconds of one action.  float64 [len(widths)]
        """
        total = np.zeros(len(widths))
        for part in self.network.parts:
            for shape in part.layers:
                if shape.name == layer:
                    costs = [self._channel_ms(shape, bits, activations) for bits in widths]
                    total += part.runs * np.array(costs)
        return total

    def _channel_ms(self, shape: LayerShape, bits: int, activations: ActivationSupport) -> float:
        if bits == 0:
            return 0.0
        return self._matmul_ms(shape.rows, shape.inputs, {bits: 1.0}, activations)

    def _part(
        self, part: PartShape, widths: Widths, units: _Units, activations: ActivationSupport
    ) -> PartPrediction:
        products = _products(part, widths, units)
        weights = sum(self._product_ms(product, activations) for product in products)
        between = sum(self._between_ms(product, activations) for product in products)
        attention = sum(self._attention_ms(shape) for shape in part.attentions)
        return PartPrediction(
            name=part.name,
            runs=part.runs,
            total_ms=part.runs * (weights + between + attention),
            weights_ms=part.runs * weights,
            attention_ms=part.runs * attention,
            between_ms=part.runs * between,
        )

    def _product_ms(self, product: _Product, activations: ActivationSupport) -> float:
        setting: ActivationSupport = activations if product.planned else "none"
        launches = self._form(product.planned).launches(product.channels, setting)
        return sum(
            self._matmul_ms(product.rows, product.inputs, widths, setting, self.rates.channel_tile)
            + self._launch_ms
            for widths in launches
        )

    def _matmul_ms(
        self,
        rows: int,
        inputs: int,
        channels: Mapping[int, float],
        activations: ActivationSupport,
        tile: int = 0,
    ) -> float:
        """Rows [rows, inputs] times channels by width in one kernel, without launch.

        Unused channels of a tile are multiplied but neither stored nor read; 0 fills no tiles.
        """
        form, rates = self._form(True), self.rates
        element = _INT8_BYTES if activations == "int8" else self._element_bytes
        read = compute_ms = expansion_ms = 0.0
        for bits, count in channels.items():
            stored = form.stored_bits(bits, activations)
            # The inputs are read once for all channels: not a cost of a channel.
            read += count * form.row_bits(inputs, bits, activations) / 8 + rows * count * element
            filled = -(-count // tile) * tile if tile else count
            integers = form.multiplies_integers(bits, activations)
            share = rates.compute_share
            if form.unpacks_beforehand(bits, activations):
                share *= rates.expanded_share.get(stored, 1.0)
                if stored in rates.expanded_gcodes_s:
                    expansion_ms += count * inputs / (rates.expanded_gcodes_s[stored] * 1e6)
            tops = self._dense_tops("int8" if integers else self._float_arithmetic)
            compute_ms += 2 * rows * inputs * filled / (tops * share * 1e9)
        return max(self._read_ms(read), compute_ms) + expansion_ms

    def _form(self, planned: bool) -> FormOnTarget:
        return FormOnTarget(self.form if planned else "dequantized", self.target)

    def _between_ms(self, product: _Product, activations: ActivationSupport) -> float:
        """Norms, activation functions, residuals, Q/DQ and channel order around one product.

        Each kernel is taken to read the product's input and to pass over its output.
        """
        numbers = product.rows * (product.inputs / product.overlap + 2 * product.outputs)
        once = self._read_ms(numbers * self._element_bytes) + self._launch_ms
        total = self.rates.kernels_between * once
        if activations == "int8" and product.planned:
            inputs = product.rows * product.inputs / product.overlap
            moved_bytes = inputs * (self._element_bytes + _INT8_BYTES)
            total += self._read_ms(moved_bytes) + self._launch_ms
        if product.reordered and self._form(product.planned).restores_order:
            moved = 2 * product.rows * product.outputs * self._element_bytes
            total += self._read_ms(moved) + self._launch_ms
        return total

    def _attention_ms(self, shape: AttentionShape) -> float:
        """One fused kernel: scores, softmax and weighted sum; the scores stay on the chip."""
        operations = 4 * shape.rows * shape.keys * shape.width
        numbers = 2 * shape.rows * shape.width + 2 * shape.keys_read * shape.kv_width
        compute = self._dense_tops(self._float_arithmetic) * self.rates.compute_share
        read_ms = self._read_ms(numbers * self._element_bytes)
        return max(operations / (compute * 1e9), read_ms) + self._launch_ms

    @property
    def _float_arithmetic(self) -> str:
        # Tensor cores multiply bfloat16 as fast as float16.
        return "float32" if self.target.compute == "float32" else "float16"

    @property
    def _element_bytes(self) -> int:
        return 4 if self.target.compute == "float32" else 2

    @property
    def _launch_ms(self) -> float:
        return self.rates.launch_us / 1e3

    def _read_ms(self, nbytes: float) -> float:
        return nbytes / (self.mode.bandwidth_gb_s * self.rates.bandwidth_share * 1e6)

    def _dense_tops(self, arithmetic: str) -> float:
        if arithmetic not in self.mode.dense_tops:
            raise QvlaError(
                f"power mode {self.mode.name!r} of {self.target.name!r} states no rate for "
                f"{arithmetic}, only for {sorted(self.mode.dense_tops)}"
            )
        return self.mode.dense_tops[arithmetic]


def _units(widths: Widths, inputs: Mapping[str, int]) -> _Units:
    produced: dict[str, NDArray[np.int64]] = {}
    read: dict[str, int] = {}
    for coupling in find_couplings(widths, inputs):
        produced |= dict.fromkeys(coupling.producers, coupling.order)
        read[coupling.consumer] = len(coupling.order)
    return _Units(produced, read)


def _products(part: PartShape, widths: Widths, units: _Units) -> list[_Product]:
    """Group a part's layers by shared input."""
    groups: dict[str, list[LayerShape]] = {}
    for layer in part.layers:
        groups.setdefault(layer.group, []).append(layer)
    return [_product(members, widths, units) for members in groups.values()]


def _product(members: list[LayerShape], widths: Widths, units: _Units) -> _Product:
    counts = np.zeros(17, np.int64)
    for layer in members:
        if layer.name not in widths:
            counts[16] += layer.channels
        elif layer.name in units.produced:
            counts += np.bincount(widths[layer.name][units.produced[layer.name]], minlength=17)
        else:
            counts += np.bincount(widths[layer.name], minlength=17)
    first = members[0]
    produces = first.name in units.produced
    channels = {int(bits): int(counts[bits]) for bits in np.flatnonzero(counts) if bits}
    several = len(channels) + bool(counts[0]) > 1
    return _Product(
        rows=first.rows,
        inputs=units.read.get(first.name, first.inputs),
        channels=channels,
        outputs=sum(channels.values()) if produces else sum(m.channels for m in members),
        # What an MLP produces is read in the stored order.
        reordered=several and not produces,
        planned=first.name in widths,
        overlap=first.overlap,
    )
