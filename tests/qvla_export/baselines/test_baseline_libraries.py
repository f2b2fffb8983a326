"""The libraries themselves: make baselines-env, or name their environment in QVLA_BASELINES."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baseline_layers import baseline_of, to_nearest
from places import ROOT

from calibration.calibration_set import CalibrationSet
from qvla_export.baselines.applied import baseline_applied
from qvla_export.baselines.baseline import Baseline
from qvla_export.baselines.environment import BaselineEnvironment, BaselineJob
from qvla_export.baselines.hadamard import rotate
from qvla_export.baselines.methods import METHODS, BaselineRequest
from qvla_export.graph.golden import golden_actions
from qvla_export.policies.layers import apply_rows, layer_shapes, traced_layers
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.observation import Observation

FOLDER = Path(os.environ.get("QVLA_BASELINES", ROOT / ".baselines"))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        not (FOLDER / "bin" / "python").is_file(),
        reason=f"no libraries of baselines at {FOLDER.name}: make baselines-env",
    ),
]
Make = Callable[..., list[Observation]]
Run = Callable[[BaselineRequest], Baseline]


@pytest.fixture(scope="module")
def run(
    tiny_checkpoint: Path, tiny_observations: Make, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """Return what makes a baseline of the tiny policy, each once."""
    folder = tmp_path_factory.mktemp("baselines")
    drawn = CalibrationSet(tuple(tiny_observations(12)), (), {"count": 12})
    drawn.save(folder / "calibration")

    @cache
    def made(request: BaselineRequest) -> Baseline:
        job = BaselineJob(
            request,
            str(tiny_checkpoint),
            str(folder / "calibration"),
            str(folder / request.setting),
        )
        return BaselineEnvironment(FOLDER).run(job)

    return made


def of(method: str, bits: int) -> BaselineRequest:
    activations = METHODS[method].activation_bits[0]
    group_size, scale_bits = (None, 32) if bits == 8 else (64, 16)
    return BaselineRequest(method, bits, activations, group_size, scale_bits, iterations=10)


@pytest.mark.parametrize(
    ("method", "bits"),
    [(m.name, bits) for m in METHODS.values() for bits in sorted({m.bits[0], m.bits[-1]})],
)
def test_a_method_quantizes_every_layer(
    method: str, bits: int, run: Run, tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    made = run(of(method, bits))
    made.require_fits(layer_shapes(traced_layers(tiny_policy)), tiny_policy.digest)
    assert {layer.weight.bits for layer in made.layers.values()} == {bits}
    assert set(made.libraries) == set(METHODS[method].distributions) and made.seconds > 0
    assert (made.activations is not None) == (method == "smoothquant")
    if made.activations is not None:
        made.activations.require_layers(made.layers)
    observations = tiny_observations(3, 1)
    expected = golden_actions(tiny_policy, None, observations).full_precision
    with baseline_applied(tiny_policy, made):
        found = golden_actions(tiny_policy, None, observations).full_precision
    assert np.isfinite(found).all() and not np.array_equal(found, expected)


def test_max_calibration_is_our_rounding(run: Run, tiny_policy: OftPolicy) -> None:
    """But for scales, which modelopt has in float32 when it rounds weights."""
    found, ours = run(of("max", 4)), baseline_of(tiny_policy, to_nearest)
    assert found.weight_bytes == ours.weight_bytes
    for name, layer in ours.layers.items():
        weight = found.layers[name].weight
        np.testing.assert_allclose(
            weight.scales.astype(np.float32), layer.weight.scales.astype(np.float32), rtol=1e-3
        )
        assert (weight.codes == layer.weight.codes).mean() > 0.99


@pytest.mark.parametrize("method", ["awq", "gptq", "hadamard-gptq", "auto-round"])
def test_a_method_that_looks_at_inputs_errs_less_on_them(
    method: str, run: Run, tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    """On the first layer, whose inputs do not depend on what is quantized."""
    name, layer = next(iter(traced_layers(tiny_policy).items()))
    inputs: list[Any] = []
    handle = layer.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    tiny_policy.greedy_actions(tiny_policy.batch(tiny_observations(12)))
    handle.remove()

    def error(baseline: Baseline) -> float:
        kept = baseline.layers[name]
        rows = torch.from_numpy(kept.weight.dequantize())
        if kept.rotation is not None:
            rows = torch.from_numpy(rotate(rows.numpy(), kept.rotation))
        if kept.input_scale is not None:
            rows = rows * torch.from_numpy(kept.input_scale).float()
        difference = rows - layer.weight.flatten(1)
        return float(apply_rows(layer, inputs[0], difference).square().mean())

    assert error(run(of(method, 2))) < error(run(of("max", 2)))
