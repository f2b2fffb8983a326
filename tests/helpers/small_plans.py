"""Small tables of sensitivities, the targets they are planned for, and a plan's widths in a row."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.target import Container, Target

TARGET = Target(
    name="test",
    runtime="ort",
    runtime_versions=">=1.32",
    opset=25,
    ir_version=13,
    containers={
        16: Container(16, None, 0),
        8: Container(8, None, 32),
        4: Container(4, 64, 32),
        2: Container(2, 64, 32),
    },
)
# Two bits are stored in four, as on TensorRT.
FOUR_BIT_TARGET = replace(
    TARGET, containers={**TARGET.containers, 2: Container(4, 64, 32)}, name="four"
)
MEASURED = (0, 2, 4, 8)
MODULES = (
    "vision_backbone.featurizer.0.attn.qkv",
    "vision_backbone.featurizer.0.mlp.fc1",
    "vision_backbone.fused_featurizer.0.mlp.fc1",
    "language_model.0.self_attn.q_proj",
    "language_model.0.mlp.up_proj",
)


def sensitivities(values: Mapping[str, NDArray[np.float32]], inputs: int = 128) -> Sensitivities:
    return Sensitivities(
        values=values,
        widths=MEASURED,
        weights_per_channel=dict.fromkeys(values, inputs),
        method="exact",
        samples=1,
        probes=0,
        policy_digest="p" * 64,
        calibration_digest="c" * 64,
        quantizer=spec_for(TARGET),
    )


def random_sensitivities(seed: int, sizes: tuple[int, ...] = (24, 40)) -> Sensitivities:
    """Errors that fall about fourfold a bit, with a spread of channels."""
    generator = np.random.default_rng(seed)
    typical = np.array([1.0, 0.3, 0.02, 1e-4])[:, None]
    values = {
        f"layer.{i}": (
            typical * generator.lognormal(0, 2, (1, n)) * generator.lognormal(0, 0.3, (4, n))
        ).astype(np.float32)
        for i, n in enumerate(sizes)
    }
    return sensitivities(values)


@st.composite
def tables(draw: st.DrawFn) -> Sensitivities:
    """Any tables, ties and errors that fall with fewer bits included."""
    values = {}
    for i in range(draw(st.integers(1, 3))):
        channels = draw(st.integers(1, 6))
        numbers = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0, 8.0]) | st.floats(0, 10, width=32)
        rows = draw(st.lists(numbers, min_size=4 * channels, max_size=4 * channels))
        values[f"layer.{i}"] = np.array(rows, np.float32).reshape(4, channels)
    return sensitivities(values)


def widths_of(plan: BitPlan) -> NDArray[np.int8]:
    return np.concatenate(list(plan.widths.values()))


def modules_table(seed: int = 0, channels: int = 40) -> Sensitivities:
    """Five layers of three modules, of different sizes and scales."""
    drawn = random_sensitivities(seed, tuple(channels + 8 * i for i in range(len(MODULES))))
    values = dict(zip(MODULES, drawn.values.values(), strict=True))
    table = sensitivities(values)
    counts = {name: 64 * (i + 1) for i, name in enumerate(MODULES)}
    return replace(table, weights_per_channel=counts)
