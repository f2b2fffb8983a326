"""Kernel rates of the targets, and the published figures they were fitted on and compared with."""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from engines.targets import ORIN_JP7, RTX4070
from qvla_export.latency_model.kernel_rates import KernelRates
from qvla_export.latency_model.network_shape import (
    LayerShape,
    NetworkShape,
    PartShape,
    decoder_part,
)
from qvla_export.latency_model.published_sizes import (
    GEOMETRIES,
    TransformerSize,
    llama_layers,
)
from qvla_export.latency_model.roofline import LatencyModel
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import PowerMode, Target

# Launch: a guess for kernels of a CUDA graph, too small to be seen in the figures. Tile: the
# smallest that the usual tensor-core products of Ampere and Ada compute at once.
ORIN_RATES = KernelRates(
    bandwidth_share=0.58,
    compute_share=0.80,
    launch_us=2.0,
    kernels_between=1,
    channel_tile=64,
    uncertainty=1.35,
    # Users report int8 products slower than float16 ones on Orin (TensorRT issues 2067, 4242).
    unchecked_uncertainty=2.0,
    checked_mode="MAXN",
    source="shares fitted on OpenVLA-7B FP16 and INT4 (MLC) on AGX Orin 64 GB, MAXN; compared "
    "with its q8 (1.06 of the published time) and Llama-3.1-8B W4A16 (1.15). No TensorRT figure, "
    "no other power mode, no int8 activations, no bucketed graph",
)
# No figure of an RTX 4070 exists for any policy, so none of its modes has been checked.
RTX4070_RATES = replace(
    ORIN_RATES,
    uncertainty=ORIN_RATES.unchecked_uncertainty,
    checked_mode="200W",
    source="Orin's shares; compared with OpenVLA-7B in bfloat16 on an RTX 4090 (eager torch, "
    "166 and 227 ms by two users: 1.08 and 0.79). No figure of an RTX 4070",
)
_RATES = {"orin-jp7": ORIN_RATES, "orin-jp6": ORIN_RATES, "rtx4070": RTX4070_RATES}

# For the comparison only: AD102, 128 SM at 2520 MHz; float16 with float32 accumulation.
_RTX4090 = PowerMode("450W", 1008.0, {"float32": 82.6, "float16": 165.2, "int8": 660.0})


@dataclass(frozen=True)
class PublishedFigure:
    """A published latency and how the model sees it."""

    name: str
    published_ms: float
    # Whether the shares were fitted on it; otherwise it only checks them.
    fitted: bool
    model: LatencyModel
    # Layer name -> int8 [channels]; layers not named are in float16.
    widths: dict[str, NDArray[np.int8]]

    @property
    def predicted_ms(self) -> float:
        """What the model says."""
        return self.model.predict(self.widths).total_ms

    @property
    def ratio(self) -> float:
        """Predicted over published."""
        return self.predicted_ms / self.published_ms


def kernel_rates(target: Target) -> KernelRates:
    """Return a target's rates.

    Raises:
        QvlaError: there are none; the message says what to do.
    """
    if target.name not in _RATES:
        raise QvlaError(
            f"no kernel rates are known for target {target.name!r}, only for {sorted(_RATES)}. "
            "Measure a CPU where it is with: qvla bench rates rates.json; then give --rates "
            "rates.json"
        )
    return _RATES[target.name]


def published_figures() -> tuple[PublishedFigure, ...]:
    """Return the figures (jetson-ai-lab's OpenVLA and benchmark pages; openvla issue 66).

    MLC's q4f16_ft and q8 quantize lm_head too; the towers run on TensorRT in float16. W4A16
    checkpoints of Llama leave lm_head alone.
    """
    maxn = ORIN_JP7.power_mode("MAXN")
    openvla = GEOMETRIES["openvla-7b"].network
    orin = LatencyModel(openvla, ORIN_JP7, maxn, ORIN_RATES)
    llama = LatencyModel(_llama_8b(), ORIN_JP7, maxn, ORIN_RATES)
    desktop = LatencyModel(openvla, RTX4070, _RTX4090, RTX4070_RATES)
    decoder = "language_model."
    return (
        PublishedFigure("OpenVLA-7B FP16, Orin MAXN", 840.0, True, orin, {}),
        PublishedFigure(
            "OpenVLA-7B q8, Orin MAXN", 471.0, False, orin, _uniform(openvla, decoder, 8)
        ),
        PublishedFigure(
            "OpenVLA-7B INT4, Orin MAXN", 336.0, True, orin, _uniform(openvla, decoder, 4)
        ),
        PublishedFigure(
            "Llama-3.1-8B W4A16 token, Orin MAXN",
            1000 / 28.1,
            False,
            llama,
            _uniform(llama.network, f"{decoder}model.", 4),
        ),
        PublishedFigure("OpenVLA-7B bf16, RTX 4090 (1)", 166.0, False, desktop, {}),
        PublishedFigure("OpenVLA-7B bf16, RTX 4090 (2)", 227.0, False, desktop, {}),
    )


def _llama_8b() -> NetworkShape:
    """One token of Llama-3.1-8B after a prompt of usual length."""
    layers = llama_layers(TransformerSize(4096, 14336, 32, kv_width=1024))
    lm_head = LayerShape("language_model.lm_head", 128256, 4096, 1)
    return NetworkShape((decoder_part(layers, "decode", 1, 1024), PartShape("head", (lm_head,))))


def _uniform(network: NetworkShape, prefix: str, bits: int) -> dict[str, NDArray[np.int8]]:
    """Uniform widths of the layers whose names begin with a prefix."""
    return {
        name: np.full(channels, bits, np.int8)
        for name, (channels, _) in network.layers.items()
        if name.startswith(prefix)
    }
