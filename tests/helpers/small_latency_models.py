"""A small network, its latency model on a Jetson, and sensitivities of its layers."""

from dataclasses import replace

from small_plans import random_sensitivities

from engines.bench.kernel_rates import ORIN_RATES
from engines.targets import ORIN_JP7
from qvla_export.latency_model.kernel_rates import KernelRates
from qvla_export.latency_model.network_shape import NetworkShape, PolicyInputs
from qvla_export.latency_model.published_sizes import Geometry, TransformerSize
from qvla_export.latency_model.roofline import LatencyModel
from qvla_export.quantizer.quantize import spec_for
from qvla_export.sensitivity.sensitivities import Sensitivities

SMALL = Geometry(
    dino=TransformerSize(64, 128, 2),
    siglip=TransformerSize(32, 96, 1),
    llama=TransformerSize(128, 256, 2, kv_width=64),
    patch_size=14,
    inputs=PolicyInputs(2, 56, 20, 4, 7, state_dim=8),
)
MODE = ORIN_JP7.power_mode("MAXN")


def model_of(network: NetworkShape, rates: KernelRates = ORIN_RATES) -> LatencyModel:
    return LatencyModel(network, ORIN_JP7, MODE, rates)


def small_sensitivities() -> Sensitivities:
    sizes = tuple(channels for channels, _ in SMALL.layers.values())
    table = random_sensitivities(3, sizes)
    return replace(
        table,
        values=dict(zip(SMALL.layers, table.values.values(), strict=True)),
        weights_per_channel={name: inputs for name, (_, inputs) in SMALL.layers.items()},
        quantizer=spec_for(ORIN_JP7),
    )
