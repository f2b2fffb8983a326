"""Codes made from what layers are fed: less error, and the same codes in torch and in the graph."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_latency_models import small_sensitivities
from tiny_bundles import make_bundle, mixed_plan

from calibration.calibration_set import CalibrationSet
from engines.load import load_engine
from engines.targets import CPU
from engines.verify import judge
from qvla_export.allocation.setting import parse_setting
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.graph.golden import CutPolicy, golden_actions, golden_actions_in_parts
from qvla_export.measurement.backward import Probes, recorded_pass
from qvla_export.measurement.measure_moments import layer_tokens, measure_moments
from qvla_export.measurement.moment_bounds import MomentSettings
from qvla_export.pipeline import evaluate as judging
from qvla_export.pipeline import export as exporting
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.round import round_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.layers import as_tokens, fake_quantized, traced_layers
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.compensation import round_layer
from qvla_export.quantizer.moments import LayerMoments, Moments
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import CODE_RANGE, compensated_spec, spec_for
from qvla_export.quantizer.round_plan import round_plan, with_rounding
from qvla_export.quantizer.rounding import Rounding
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch, PlanMismatch, QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.tensor_files import write_tensor_file

Observations = Callable[..., list[Observation]]
WIDTHS = (0, 2, 4, 8, 16)
FULL = compensated_spec(CPU)
DIGEST = "c" * 64


def layer_moments(channels: int, inputs: int, seed: int = 0) -> LayerMoments:
    """Of correlated inputs that are not centred, and of correlated channels."""
    generator = np.random.default_rng(seed)
    x = generator.standard_normal((200, inputs)) @ generator.standard_normal((inputs, inputs)) + 1
    g = generator.standard_normal((200, channels)) @ generator.standard_normal((channels, channels))
    mean = x.mean(axis=0)
    central = (x - mean).T @ (x - mean) / len(x)
    parts = (mean, central[None], (g.T @ g / len(g))[None])
    return LayerMoments(*(part.astype(np.float32) for part in parts))


def expected_error(moments: LayerMoments, errors: NDArray[np.float64]) -> float:
    inputs = moments.input_matrix(np.arange(errors.shape[1]))
    channels = moments.channel_matrix(np.arange(errors.shape[0]))
    return float(np.einsum("co,oi,ij,cj->", channels, errors, inputs, errors))


@settings(max_examples=40, deadline=None)
@given(
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=40),
    inputs=st.integers(1, 150),
    lost=st.integers(0, 20),
    seed=st.integers(0, 9),
)
def test_codes_are_in_range_and_dequantize_to_the_rows(
    widths: list[int], inputs: int, lost: int, seed: int
) -> None:
    bits = np.array(widths, np.int8)
    rows = np.random.default_rng(seed).standard_normal((len(bits), inputs)).astype(np.float32)
    order = np.random.default_rng(seed).permutation(inputs)[: max(1, inputs - lost)]
    made = round_layer(rows, bits, FULL, layer_moments(len(bits), inputs, seed), order)
    for width, (low, high) in CODE_RANGE.items():
        codes = made.codes[bits == width]
        assert codes.size == 0 or (low <= codes.min() and codes.max() <= high)
    weights = made.rows(bits, FULL, order)
    gone = np.setdiff1d(np.arange(inputs), order)
    assert not weights[:, gone].any() and not weights[bits == 0].any()
    assert np.isfinite(weights).all()
    for channel in np.flatnonzero(np.isin(bits, list(CODE_RANGE))):
        size = FULL.rule(int(bits[channel])).group_size or inputs
        steps = np.repeat(made.scales[channel], size)[: len(order)]
        np.testing.assert_array_equal(weights[channel, order], made.codes[channel, order] * steps)


@pytest.mark.parametrize("bits", [2, 4])
def test_each_ingredient_lowers_the_expected_error(bits: int) -> None:
    moments = layer_moments(48, 128)
    rows = np.random.default_rng(1).standard_normal((48, 128)).astype(np.float32)
    widths = np.full(48, bits, np.int8)
    widths[:6] = 0
    found = []
    for spec in (
        spec_for(CPU),
        replace(spec_for(CPU), weighted_scales=True, compensation="inputs"),
        FULL,
    ):
        made = round_layer(rows, widths, spec, moments, np.arange(128))
        errors = made.rows(widths, spec, np.arange(128)).astype(np.float64) - rows
        found.append(expected_error(moments, errors))
    assert found == sorted(found, reverse=True)
    assert found[2] < 0.7 * found[1] < 0.7 * found[0]


def test_channels_that_leave_are_answered_by_nobody() -> None:
    moments = layer_moments(20, 30)
    rows = np.random.default_rng(1).standard_normal((20, 30)).astype(np.float32)
    widths = np.full(20, 4, np.int8)
    widths[:5] = 0
    one = round_layer(rows, widths, FULL, moments, np.arange(30), gone=np.arange(5))
    other = rows.copy()
    other[:5] *= 100
    two = round_layer(other, widths, FULL, moments, np.arange(30), gone=np.arange(5))
    np.testing.assert_array_equal(one.codes[5:], two.codes[5:])


@pytest.fixture(scope="module")
def moments(tiny_policy: OftPolicy, tiny_observations: Observations) -> Moments:
    return measure_moments(tiny_policy, tiny_observations(6), DIGEST, MomentSettings(batch_size=2))


@pytest.fixture(scope="module")
def plan(tiny_policy: OftPolicy, moments: Moments) -> BitPlan:
    return round_plan(tiny_policy, replace(mixed_plan(tiny_policy), quantizer=FULL), moments)


def test_moments_are_those_of_the_inputs(
    tiny_policy: OftPolicy, tiny_observations: Observations, moments: Moments
) -> None:
    """Of one layer, in one batch and in several; its tokens count as the action's gradients say."""
    name = next(iter(moments.layers))
    layer, probes = traced_layers(tiny_policy)[name], Probes(moments.probes, moments.seed)
    seen, worths = [], []
    for number, pair in enumerate(np.array_split(np.arange(6), 3)):
        chosen = [tiny_observations(6)[index] for index in pair]
        actions, calls = recorded_pass(tiny_policy, {name: layer}, chosen)
        inputs, outputs = calls.joined_inputs(), calls.joined_outputs()
        signs, weight = probes.draw(actions.reshape(2, -1), number)
        for sign in signs:
            flat = (actions.reshape(2, -1) * sign).sum()
            (gradient,) = torch.autograd.grad(flat, [outputs[name]], retain_graph=True)
            fed = layer_tokens(layer, inputs[name])
            seen.append(fed.flatten(0, 1).double().numpy())
            worth = as_tokens(layer, gradient).square().sum(dim=-1)
            # Observations count by the root of their squares.
            whole = (worth * fed.square().sum(dim=-1)).reshape(2, -1).sum(dim=1).sqrt()
            worths.append(weight * (worth.reshape(2, -1) / whole[:, None]).flatten())
    tokens, worth = np.concatenate(seen), torch.cat(worths).double().numpy()
    worth /= worth.sum()
    found = moments.layers[name]
    np.testing.assert_allclose(found.mean, worth @ tokens, atol=1e-5)
    order = np.arange(16)
    expected = (tokens.T * worth) @ tokens
    np.testing.assert_allclose(found.input_matrix(order), expected[:16, :16], rtol=1e-3, atol=1e-6)
    blocks = MomentSettings(batch_size=2, largest_block=16)
    split = measure_moments(tiny_policy, tiny_observations(6), DIGEST, blocks)
    np.testing.assert_allclose(
        split.layers[name].inputs[0], found.inputs[0][:16, :16], rtol=1e-3, atol=1e-6
    )


def test_measurement_resumes(
    tiny_policy: OftPolicy, tiny_observations: Observations, moments: Moments, tmp_path: Path
) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done == 2:
            raise Killed

    journal, how = tmp_path / "moments.progress", MomentSettings(batch_size=2)
    with pytest.raises(Killed):
        measure_moments(tiny_policy, tiny_observations(6), DIGEST, how, journal, kill)
    calls: list[int] = []
    again = measure_moments(
        tiny_policy, tiny_observations(6), DIGEST, how, journal, lambda done, _: calls.append(done)
    )
    assert calls == [4, 6]
    assert again.digest == moments.digest


def test_artifacts_survive_the_disk(plan: BitPlan, moments: Moments, tmp_path: Path) -> None:
    assert plan.rounding is not None
    for made, kind in ((moments, Moments), (plan.rounding, Rounding)):
        made.save(tmp_path / "file")
        assert kind.load(tmp_path / "file").digest == made.digest
        data = bytearray((tmp_path / "file").read_bytes())
        data[-5] ^= 1
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(ArtifactError, match="damaged"):
            kind.load(tmp_path / "file")
    plan.save(tmp_path / "plan.json")
    loaded = BitPlan.load(tmp_path / "plan.json")
    assert loaded.quantizer == FULL and loaded.rounding is None
    assert with_rounding(loaded, plan.rounding).digest == plan.digest


def test_files_written_with_bias_correction_are_refused(
    plan: BitPlan, moments: Moments, tmp_path: Path
) -> None:
    """They name the command that makes them anew."""
    plan.save(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())
    written["quantizer"]["bias_correction"] = True
    (tmp_path / "plan.json").write_text(json.dumps(written))
    with pytest.raises(ArtifactError, match=r"made with bias correction.*qvla plan"):
        BitPlan.load(tmp_path / "plan.json")
    measured = small_sensitivities()
    provenance = dict(measured._provenance())
    provenance["quantizer"] = written["quantizer"]
    write_tensor_file(tmp_path / "old", measured._tensors(), provenance)
    with pytest.raises(ArtifactError, match=r"made with bias correction.*qvla sensitivities"):
        Sensitivities.load(tmp_path / "old")
    assert plan.rounding is not None
    for made, command in ((moments, "qvla moments"), (plan.rounding, "qvla round")):
        old = {**made._provenance(), "format": f"{made.kind.form[:-1]}1"}
        write_tensor_file(tmp_path / "old", made._tensors(), old)
        with pytest.raises(ArtifactError, match=command):
            type(made).load(tmp_path / "old")


def test_what_does_not_belong_together_is_refused(
    tiny_policy: OftPolicy, plan: BitPlan, moments: Moments
) -> None:
    assert plan.rounding is not None
    bare = replace(plan, rounding=None)
    with pytest.raises(PlanMismatch, match="qvla round"), fake_quantized(tiny_policy, bare):
        pass
    other = mixed_plan(tiny_policy, seed=3)
    with pytest.raises(ArtifactMismatch, match="qvla round"):
        with_rounding(other, plan.rounding)
    with pytest.raises(ArtifactMismatch, match="qvla moments"):
        round_plan(tiny_policy, replace(bare, calibration_digest="d" * 64), moments)
    with pytest.raises(QvlaError, match="no moments of layer"):
        round_plan(tiny_policy, bare, replace(moments, layers={}))
    with pytest.raises(QvlaError, match="compensation must be one of"):
        replace(FULL, compensation="all")  # type: ignore[arg-type]  # what is refused


def test_engine_computes_with_the_same_codes(
    tiny_policy: OftPolicy, tiny_observations: Observations, plan: BitPlan, tmp_path: Path
) -> None:
    bundle = make_bundle(tiny_policy, plan, tiny_observations(8, seed=8), tmp_path / "bundle")
    assert sum(n for part, n in bundle.weight_bytes.items() if part != "rest") == plan.weight_bytes
    with load_engine(bundle, threads=1) as engine:
        drift = judge(bundle, engine).drift
    assert drift.worst <= 1e-3
    nearest = mixed_plan(tiny_policy)
    golden = bundle.golden()
    plain = golden_actions(tiny_policy, nearest, tiny_observations(8, seed=8))
    assert np.abs(golden.reference - plain.reference).max() > 0.05


def test_parts_compute_the_same(
    tiny_policy: OftPolicy, tiny_observations: Observations, plan: BitPlan
) -> None:
    observations = tiny_observations(3, seed=9)
    parts = tiny_policy.parts(1)
    names = {name for name, _ in tiny_policy.module.named_parameters()}
    reads = {
        part.name: [n for n, _ in part.module.named_parameters(prefix="module")] for part in parts
    }
    weights = {
        stage: [n.removeprefix("module.module.") for n in found] for stage, found in reads.items()
    }
    assert {n for found in weights.values() for n in found} <= names
    cut = CutPolicy(tiny_policy, parts, tiny_policy.program(1), weights)
    staged = golden_actions_in_parts(cut, plan, observations)
    whole = golden_actions(tiny_policy, plan, observations)
    np.testing.assert_allclose(staged.reference, whole.reference, atol=1e-4)


def test_a_run_rounds_its_plan_and_packs_the_codes(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    run, w4 = RunFolder(tmp_path), parse_setting("w4")
    drawn = tuple(tiny_observations(12))
    CalibrationSet(drawn[:8], drawn[8:], {"test": 1}).save(run.calibration)
    request = SensitivityRequest(quantizer="nearest", probes=2)
    plain = sensitivities(run, tiny_policy, CPU, request)
    measured = sensitivities(run, tiny_policy, CPU, replace(request, quantizer="compensated"))
    assert measured.quantizer == compensated_spec(CPU) != plain.quantizer
    # A channel alone moves the action less where its other weights answer; of 0 bits none is left.
    for bits in (2, 4):
        sums = [sum(float(t.at(n, bits).sum()) for n in t.values) for t in (measured, plain)]
        assert sums[0] < sums[1]
    plan_setting(run, w4, CPU, tiny_policy.digest)
    with pytest.raises(ArtifactError, match="qvla round --setting w4"):
        exporting.export(run, w4, tiny_policy, CPU)
    rounded = round_setting(run, w4, tiny_policy)
    kept = round_setting(run, w4, tiny_policy)
    assert rounded is not None and kept is not None and rounded.rounding is not None
    assert kept.rounding is not None and kept.rounding.digest == rounded.rounding.digest
    bundle = exporting.export(run, w4, tiny_policy, CPU)
    assert bundle.plan is not None
    assert bundle.plan["rounding_digest"] == rounded.rounding.digest
    assert exporting.export(run, w4, tiny_policy, CPU).digest == bundle.digest
    assert judging.action_error(run, w4, tiny_policy).rms > 0


def test_bundles_of_parts_pack_the_codes_too(
    tiny_policy: OftPolicy, tiny_observations: Observations, plan: BitPlan, tmp_path: Path
) -> None:
    golden = tiny_observations(2, seed=8)
    bundle = export_bundle(
        tiny_policy, plan, CPU, golden, tmp_path / "b", ExportOptions(layers_per_part=1)
    )
    assert sum(n for part, n in bundle.weight_bytes.items() if part != "rest") == plan.weight_bytes
    with load_engine(bundle, threads=1) as engine:
        assert judge(bundle, engine).drift.worst <= 1e-3
