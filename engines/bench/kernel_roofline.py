"""What compiled kernels should take: a roofline from their own instructions. Never a measurement.

Of a layer's products the slowest of three counts: what tensor cores multiply, rows and channels of
whole blocks included; what warps issue, from the disassembly; what is read and written once. Shares
of a device's rates are those of `kernel_rates`, so that both predictions can be compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from engines.bench.compiled_kernels import CompiledKernel
from engines.kernels.tile_layout import TILE
from qvla_export.latency_model.network_shape import LayerShape
from qvla_export.latency_model.roofline import LatencyModel
from qvla_export.shared.target import ActivationSupport

# A multiprocessor of sm_80 to sm_90 issues four warps' instructions a clock, and has 128 lanes of
# float32, two operations each: what a target's float32 rate is counted from.
_ISSUES, _FLOAT32_OPERATIONS = 4, 256


@dataclass(frozen=True)
class KernelPrediction:
    """Predicted milliseconds of one layer's product, the launch aside."""

    multiply_ms: float
    issue_ms: float
    memory_ms: float

    @property
    def ms(self) -> float:
        """The slowest of the three."""
        return max(self.multiply_ms, self.issue_ms, self.memory_ms)


def predict_product(
    kernel: CompiledKernel, model: LatencyModel, layer: LayerShape, shares: Mapping[int, float]
) -> KernelPrediction:
    """Predict one layer's product by a compiled form.

    Args:
        kernel: what is compiled for the model's device.
        model: rates and power mode.
        layer: rows, inputs and channels.
        shares: width -> share of the layer's channels; 0 bits are pruned.
    """
    form, rates, tops = kernel.form, model.rates, model.mode.dense_tops
    blocks = -(-layer.rows // form.block_rows)
    operations = {"float16": 0.0, "int8": 0.0}
    issued = read_bytes = 0.0
    for bits, share in shares.items():
        if bits and share:
            loop, tiles = kernel.loop(bits), -(-round(layer.channels * share) // TILE)
            integers = form.integers and bits < 16
            weights = tiles * TILE * layer.inputs
            operations["int8" if integers else "float16"] += 2 * weights * blocks * form.block_rows
            steps = tiles * blocks * layer.inputs / loop.inputs
            issued += steps * loop.instructions * form.warps
            read_bytes += weights * loop.weight_bytes
    element = 1 if form.integers else 2
    read_bytes += layer.rows * (layer.inputs * element + 2 * layer.channels)
    clocks = tops["float32"] * 1e12 / _FLOAT32_OPERATIONS
    multiply_s = sum(count / (tops[kind] * 1e12) for kind, count in operations.items())
    return KernelPrediction(
        multiply_s / rates.compute_share * 1e3,
        issued / (_ISSUES * clocks) / rates.compute_share * 1e3,
        read_bytes / (model.mode.bandwidth_gb_s * rates.bandwidth_share * 1e9) * 1e3,
    )


def predict_pass(
    kernel: CompiledKernel,
    model: LatencyModel,
    planned: frozenset[str],
    shares: Mapping[int, float],
) -> float:
    """Predict an action's milliseconds where one form runs all planned layers.

    What is between products, attention and the layers that no plan names are as in the model.

    Args:
        kernel: a form for many rows: the parts of a single pass all have them.
        model: of the network and device.
        planned: names of layers whose products the kernel computes.
        shares: width -> share of each layer's channels.
    """
    setting: ActivationSupport = "int8" if kernel.form.integers else "none"
    widths = {name: np.full(model.network.layers[name][0], 8, np.int8) for name in planned}
    rest = model.predict(widths, setting)
    total = sum(part.total_ms - part.weights_ms for part in rest.parts)
    launch_ms = model.rates.launch_us / 1e3
    for part in model.network.parts:
        groups: dict[str, list[LayerShape]] = {}
        for layer in part.layers:
            groups.setdefault(layer.group, []).append(layer)
        for members in groups.values():
            total += part.runs * launch_ms
            for layer in members:
                if layer.name in planned:
                    total += part.runs * predict_product(kernel, model, layer, shares).ms
                else:
                    cost = model.channel_ms(layer.name, (16,))[0]
                    total += cost * layer.channels
    return total
