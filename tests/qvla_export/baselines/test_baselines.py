"""Baselines of other libraries: the artifact, what is judged, the command; not the libraries."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from baseline_layers import ROUND_TO_NEAREST, as_floats, baseline_of, to_nearest
from torch import nn

from engines.targets import CPU
from qvla_export.baselines.applied import BaselinePolicy, baseline_applied
from qvla_export.baselines.baseline import Baseline, BaselineLayer
from qvla_export.graph.golden import golden_actions
from qvla_export.policies.layers import (
    fake_quantized,
    layer_shapes,
    rounded_inputs,
    traced_layers,
)
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.errors import ArtifactError, PlanMismatch, QvlaError
from qvla_export.shared.observation import Observation

Make = Callable[..., list[Observation]]


def migrated(name: str, rows: Any) -> BaselineLayer:
    """Float weights of inputs that are scaled by powers of two."""
    factors = 2.0 ** (np.arange(rows.shape[1]) % 5 - 2.0)
    scaled = (rows / factors).astype(np.float32)
    return replace(as_floats(name, scaled), input_scale=factors.astype(np.float16))


def actions(policy: OftPolicy, observations: list[Observation]) -> Any:
    return golden_actions(policy, None, observations).full_precision


@pytest.fixture
def rounded(tiny_policy: OftPolicy) -> Baseline:
    return baseline_of(tiny_policy, to_nearest)


def test_float_weights_make_the_float_policy(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    observations = tiny_observations(3)
    expected = actions(tiny_policy, observations)
    with baseline_applied(tiny_policy, baseline_of(tiny_policy, as_floats)):
        assert np.array_equal(actions(tiny_policy, observations), expected)


def test_our_rounding_through_a_baseline_is_our_plan(
    tiny_policy: OftPolicy, tiny_observations: Make, rounded: Baseline, tmp_path: Path
) -> None:
    observations = tiny_observations(3)
    plan = uniform_plan(
        layer_shapes(traced_layers(tiny_policy)), 4, CPU, tiny_policy.digest, ROUND_TO_NEAREST
    )
    rounded.save(tmp_path / "baseline")
    loaded = Baseline.load(tmp_path / "baseline")
    with fake_quantized(tiny_policy, plan):
        expected = actions(tiny_policy, observations)
    floats = actions(tiny_policy, observations)
    with baseline_applied(tiny_policy, loaded):
        found = actions(tiny_policy, observations)
    assert np.array_equal(found, expected) and not np.array_equal(found, floats)
    assert np.array_equal(actions(tiny_policy, observations), floats)
    assert loaded.weight_bytes == plan.weight_bytes
    assert loaded.float16_bytes == plan.float16_bytes
    assert loaded.mean_bits_per_channel == plan.mean_bits_per_channel == 4
    assert loaded.stored_bits_per_weight == pytest.approx(plan.stored_bits_per_weight)


def test_scaled_inputs_undo_scaled_weights(tiny_policy: OftPolicy, tiny_observations: Make) -> None:
    observations = tiny_observations(2)
    expected = actions(tiny_policy, observations)
    scaled = baseline_of(tiny_policy, migrated)
    with baseline_applied(tiny_policy, scaled):
        # Powers of two: nothing is rounded.
        assert np.array_equal(actions(tiny_policy, observations), expected)
    plain = baseline_of(tiny_policy, as_floats)
    inputs = sum(layer.weight.codes.shape[1] for layer in plain.layers.values())
    assert scaled.weight_bytes == plain.weight_bytes + 2 * inputs


def test_inputs_are_rounded_after_they_are_scaled(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    name, layer = next(
        (n, found) for n, found in tiny_policy.layers().items() if isinstance(found, nn.Linear)
    )
    whole = baseline_of(tiny_policy, as_floats)
    factors = np.full(layer.in_features, 0.5, np.float16)
    half = replace(whole.layers[name], input_scale=factors)
    ranges = ActivationRanges(8, "max", {name: 1.0})
    inputs = torch.linspace(-4, 4, layer.in_features)[None]
    with baseline_applied(
        tiny_policy, replace(whole, layers={**whole.layers, name: half}, activations=ranges)
    ):
        found = layer(inputs)
    with rounded_inputs({name: layer}, ranges):
        assert torch.equal(found, layer(inputs * 0.5))
    assert not torch.equal(found, layer(inputs * 0.5))


def test_a_convolutions_patches_are_scaled_before_they_are_rounded(tiny_policy: OftPolicy) -> None:
    name, layer = next((n, c) for n, c in tiny_policy.layers().items() if isinstance(c, nn.Conv2d))
    whole = baseline_of(tiny_policy, as_floats)
    half = np.full(layer.weight[0].numel(), 0.5, np.float16)
    layers = {**whole.layers, name: replace(whole.layers[name], input_scale=half)}
    ranges = ActivationRanges(8, "max", {name: 1.0})
    inputs = torch.linspace(-4, 4, 3 * 28 * 28).reshape(1, 3, 28, 28)
    with baseline_applied(tiny_policy, replace(whole, layers=layers, activations=ranges)):
        found = layer(inputs)
    with rounded_inputs({name: layer}, ranges):
        torch.testing.assert_close(found, layer(inputs * 0.5))
    assert not torch.allclose(found, layer(inputs * 0.5), atol=1e-4)


def test_a_baseline_acts_until_it_is_closed(
    tiny_policy: OftPolicy, tiny_observations: Make, rounded: Baseline
) -> None:
    (observation,) = tiny_observations(1)
    floats = tiny_policy.infer(observation).normalized
    wrapped = BaselinePolicy(tiny_policy, rounded)
    changed = wrapped.infer(observation).normalized
    wrapped.close()
    assert not np.array_equal(changed, floats)
    assert np.array_equal(tiny_policy.infer(observation).normalized, floats)


def test_a_baseline_of_another_policy_is_refused(tiny_policy: OftPolicy, rounded: Baseline) -> None:
    name, *rest = rounded.layers
    for wrong in (
        replace(rounded, policy_digest="0" * 64),
        replace(rounded, layers={n: rounded.layers[n] for n in rest}),
        replace(rounded, layers={**rounded.layers, "other": rounded.layers[name]}),
    ):
        with pytest.raises(PlanMismatch, match="qvla baseline"):
            baseline_applied(tiny_policy, wrong).__enter__()


def test_saved_baselines_are_read_as_they_were(tiny_policy: OftPolicy, tmp_path: Path) -> None:
    made = replace(
        baseline_of(tiny_policy, migrated),
        activations=ActivationRanges(8, "max", {"a": 0.3}),
        settings={"iters": 200},
        libraries={"some-library": "1.2"},
    )
    made.save(tmp_path / "baseline")
    loaded = Baseline.load(tmp_path / "baseline")
    assert loaded.digest == made.digest
    assert (loaded.request, loaded.activations) == (made.request, made.activations)
    assert (loaded.settings, loaded.libraries, loaded.seconds) == (
        made.settings,
        made.libraries,
        made.seconds,
    )
    for name, layer in made.layers.items():
        scale = loaded.layers[name].input_scale
        assert scale is not None and np.array_equal(scale, layer.input_scale)
        assert np.array_equal(loaded.layers[name].weight.codes, layer.weight.codes)


def rewritten(path: Path, **changes: Any) -> None:
    described = json.loads((path / "baseline.json").read_text())
    (path / "baseline.json").write_text(json.dumps({**described, **changes}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "qvla-plan-1"}, "not a baseline of format"),
        ({"layers": {}}, "damaged|states"),
        ({"layers": {"no.such.layer": {"bits": 4, "group_size": 64}}}, "damaged"),
        ({"layers": []}, "damaged"),
        ({"layers": {"x": {"bits": 4, "group_size": 64, "turn": 64}}}, "damaged.*not know"),
        ({"weight_bytes": 1}, "states 1 weight bytes"),
        ({"request": {"method": "magic", "bits": 4}}, "damaged"),
        ({"request": None}, "damaged"),
        ({"seconds": "soon"}, "damaged"),
        ({"activations": {"bits": 8}}, "damaged"),
        ({"tensors_digest": "0" * 64}, "changed after it was made"),
    ],
)
def test_damaged_descriptions_are_refused(
    rounded: Baseline, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    rounded.save(tmp_path / "baseline")
    rewritten(tmp_path / "baseline", **changes)
    with pytest.raises(ArtifactError, match=message):
        Baseline.load(tmp_path / "baseline")


def test_damaged_tensors_are_refused(rounded: Baseline, tmp_path: Path) -> None:
    path = tmp_path / "baseline"
    rounded.save(path)
    tensors = path / "layers.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-1] ^= 1
    for wrong in (bytes(data), bytes(data[:-9]), b""):
        tensors.write_bytes(wrong)
        with pytest.raises(ArtifactError, match="changed after it was made"):
            Baseline.load(path)
    tensors.unlink()
    with pytest.raises(ArtifactError, match="damaged"):
        Baseline.load(path)


CODES = np.zeros((2, 6), np.int8)
SCALES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("codes", "scales", "bits", "group_size"),
    [
        (CODES + 2, SCALES, 2, 2),
        (CODES - 5, SCALES, 3, 2),
        (CODES, SCALES[:, :2], 4, 2),
        (CODES, SCALES, 4, None),
        (CODES, SCALES * np.float32(np.nan), 4, 2),
        (CODES.astype(np.int16), SCALES, 4, 2),
        (CODES[0], SCALES, 4, 2),
        (CODES, SCALES, 9, 2),
        (CODES, SCALES, 1, 2),
        (np.full((2, 6), np.inf, np.float32), SCALES[:, :0], 32, None),
    ],
)
def test_wrong_layers_are_refused(codes: Any, scales: Any, bits: int, group_size: Any) -> None:
    with pytest.raises(QvlaError), np.errstate(invalid="ignore"):
        BaselineLayer(QuantizedWeight(codes, scales, bits, group_size))


def test_wrong_input_scales_are_refused() -> None:
    weight = QuantizedWeight(CODES, SCALES, 4, 2)
    for wrong in (np.ones(5, np.float16), np.ones(6, np.float32), np.full(6, np.inf, np.float16)):
        with pytest.raises(QvlaError):
            BaselineLayer(weight, wrong)  # type: ignore[arg-type]  # what is refused
