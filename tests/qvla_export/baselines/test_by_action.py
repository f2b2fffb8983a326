"""What no library makes: scales for what the action feels, signs, rotated inputs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baseline_layers import baseline_of, to_nearest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qvla_export.baselines.applied import baseline_applied
from qvla_export.baselines.baseline import Baseline, BaselineLayer
from qvla_export.baselines.by_action import quantize
from qvla_export.baselines.hadamard import hadamard, rotate, rotation_size
from qvla_export.baselines.layer_adapter import GroupedLinear, hand_over
from qvla_export.baselines.methods import BaselineRequest
from qvla_export.baselines.quantized import Calibration
from qvla_export.graph.golden import golden_actions
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.policies.layers import layer_shapes, traced_layers, weight_rows
from qvla_export.policies.oft.policy import OftPolicy, load_oft_policy
from qvla_export.quantizer.layer_work import INPUT_DAMPING
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]
GROUP = 64


def made(policy: OftPolicy, observations: list[Observation], method: str, bits: int) -> Baseline:
    request = BaselineRequest(method, bits, group_size=GROUP)
    told: list[tuple[int, int]] = []
    done = quantize(Calibration(policy, observations, request, lambda *step: told.append(step)))
    assert told[-1] == (len(done.layers), len(done.layers))
    return Baseline(request, done.layers, policy.digest, "c" * 64, settings=done.settings)


def error(policy: OftPolicy, baseline: Baseline, observations: list[Observation]) -> float:
    expected = golden_actions(policy, None, observations).full_precision
    with baseline_applied(policy, baseline):
        found = golden_actions(policy, None, observations).full_precision
    return float(np.sqrt(np.square(found - expected).mean()))


def own_signs(name: str, rows: Any) -> BaselineLayer:
    """Each weight's own sign, at the mean size of its group."""
    sizes = np.pad(np.abs(rows), ((0, 0), (0, -rows.shape[1] % GROUP)), constant_values=np.nan)
    scales = np.nanmean(sizes.reshape(len(rows), -1, GROUP), axis=2).astype(np.float16)
    codes = np.where(rows < 0, -1, 1).astype(np.int8)
    return BaselineLayer(QuantizedWeight(codes, scales, 1, GROUP))


def test_signs_make_up_for_each_other(
    tiny_policy: OftPolicy, tiny_observations: Make, tmp_path: Path
) -> None:
    observations = tiny_observations(8)
    signs = made(tiny_policy, observations, "sign", 1)
    signs.require_fits(layer_shapes(traced_layers(tiny_policy)), tiny_policy.digest)
    weights = [layer.weight for layer in signs.layers.values()]
    assert all(set(np.unique(weight.codes)) <= {-1, 1} for weight in weights)
    packed = sum(-(-weight.codes.size // 8) + 2 * weight.scales.size for weight in weights)
    assert (signs.weight_bytes, signs.mean_bits_per_channel) == (packed, 1.0)
    own = baseline_of(tiny_policy, own_signs)
    assert error(tiny_policy, signs, observations) < error(tiny_policy, own, observations)
    signs.save(tmp_path / "signs")
    assert Baseline.load(tmp_path / "signs").digest == signs.digest


def test_scales_are_those_of_the_least_error_that_the_action_feels(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    observations = tiny_observations(8)
    fisher, nearest = (
        made(tiny_policy, observations, "fisher", 4),
        baseline_of(tiny_policy, to_nearest),
    )
    assert fisher.weight_bytes == nearest.weight_bytes
    moments, ratios = measure_moments(tiny_policy, observations, ""), []
    for name, layer in traced_layers(tiny_policy).items():
        rows = weight_rows(layer)
        weights = moments.of(name, rows.shape).input_diagonal(np.arange(rows.shape[1]))
        weights += INPUT_DAMPING * weights.mean()
        ours, theirs = (
            (weights * np.square(made_of.layers[name].weight.dequantize() - rows)).sum()
            for made_of in (fisher, nearest)
        )
        ratios.append(ours / theirs)
    assert max(ratios) <= 1.0001 and np.mean(ratios) < 0.95
    coarse = made(tiny_policy, observations, "fisher", 3)
    assert max(np.abs(x.weight.codes + 0.5).max() for x in coarse.layers.values()) == 3.5


def test_what_is_no_sign_or_no_rotation_is_refused() -> None:
    scales = np.ones((1, 1), np.float16)
    with pytest.raises(QvlaError, match="signs, -1 and 1"):
        BaselineLayer(QuantizedWeight(np.array([[1, 0]], np.int8), scales, 1, None))
    with pytest.raises(QvlaError, match=r"run at \[1\] bits"):
        BaselineRequest("sign", 2)
    for size in (0, 3, 4):
        with pytest.raises(QvlaError, match="power of two in them"):
            BaselineLayer(QuantizedWeight(np.ones((1, 6), np.int8), scales, 4, None), None, size)


@given(st.integers(1, 200), st.integers(0, 2**31))
def test_rotated_twice_is_as_before(inputs: int, seed: int) -> None:
    size = rotation_size(inputs)
    assert size <= 64 and inputs % size == 0 and (size == 64 or inputs % (2 * size))
    rows = np.random.default_rng(seed).normal(size=(3, inputs)).astype(np.float32)
    once = rotate(rows, size)
    np.testing.assert_allclose(np.linalg.norm(once, axis=1), np.linalg.norm(rows, axis=1), 1e-4)
    np.testing.assert_allclose(rotate(once, size), rows, atol=1e-4)
    assert set(np.abs(hadamard(size) * np.sqrt(size)).round(4).flatten().tolist()) == {1.0}


@pytest.mark.parametrize("layer", [nn.Conv2d(2, 5, 4, stride=4), nn.Linear(12, 4)])
def test_a_rotated_layer_maps_as_the_layer_does(layer: Any) -> None:
    torch.manual_seed(0)
    inputs = torch.randn((2, 12) if isinstance(layer, nn.Linear) else (2, 2, 12, 16))
    size = rotation_size(layer.weight[0].numel())
    handed = GroupedLinear(layer, 7, size)
    torch.testing.assert_close(handed(inputs), layer(inputs), atol=1e-5, rtol=1e-4)
    rows = layer.weight.detach().flatten(1).numpy()
    stored = handed.linear.weight.detach().numpy()[:, : rows.shape[1]]
    assert not np.allclose(stored, rows)
    np.testing.assert_allclose(rotate(stored, size), rows, atol=1e-5)


def test_a_policy_whose_inputs_are_rotated_acts_as_before(
    tiny_checkpoint: Path, tiny_observations: Make, tmp_path: Path
) -> None:
    policy, observations = load_oft_policy(tiny_checkpoint), tiny_observations(3)
    expected = golden_actions(policy, None, observations).full_precision
    layers = {}
    for name, layer in traced_layers(policy).items():
        rows = layer.weight.detach().flatten(1).numpy()
        size, nothing = rotation_size(rows.shape[1]), np.zeros((len(rows), 0), np.float32)
        layers[name] = BaselineLayer(
            QuantizedWeight(rotate(rows, size), nothing, 32, None), rotation=size
        )
    whole = Baseline(BaselineRequest("hadamard-gptq", 4), layers, policy.digest, "c" * 64)
    whole.save(tmp_path / "rotated")
    with baseline_applied(policy, Baseline.load(tmp_path / "rotated")):
        stored = golden_actions(policy, None, observations).full_precision
    np.testing.assert_allclose(stored, expected, atol=1e-4)
    hand_over(policy, 64, rotates=True)
    handed = golden_actions(policy, None, observations).full_precision
    np.testing.assert_allclose(handed, expected, atol=1e-4)
