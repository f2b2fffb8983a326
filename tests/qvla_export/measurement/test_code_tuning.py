"""Codes that are tuned together: less action error in the same bytes, what cannot be tuned."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from openvla_cases import load_openvla_policy, openvla_observations, write_tiny_openvla
from tiny_bundles import make_bundle, mixed_plan

from calibration.calibration_set import CalibrationSet
from engines.load import load_engine
from engines.targets import CPU
from engines.verify import judge
from qvla_export.allocation.setting import parse_setting
from qvla_export.graph.golden import token_divergence
from qvla_export.measurement.code_tuning import TuningSettings, tune_codes
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.pipeline.deployment.cross_validation import predict_error
from qvla_export.pipeline.fake_quantized import judge_plan
from qvla_export.pipeline.plan import PlanOptions
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.round import round_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.families import load_policy
from qvla_export.policies.layers import fake_quantized
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import QuantizerSpec, compensated_spec, spec_for
from qvla_export.quantizer.round_plan import round_plan
from qvla_export.quantizer.scale_search import CODE_RANGE
from qvla_export.shared.errors import ArtifactError, PlanMismatch, QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target

Make = Callable[..., list[Observation]]
LEVELED = CPU.with_two_level_scales()


def coded(policy: OftPolicy, seen: list[Observation], target: Target = CPU) -> BitPlan:
    """Return a plan of all widths with its codes."""
    quantizer = replace(compensated_spec(target), tuned_codes=True)
    plan = replace(mixed_plan(policy), quantizer=quantizer, containers=dict(target.containers))
    return round_plan(policy, plan, measure_moments(policy, seen, "c" * 64))


def with_scales_off(plan: BitPlan) -> BitPlan:
    """Return the plan with scales off by 8 % a channel: more than the codes move the actions."""
    assert plan.rounding is not None
    generator, off = np.random.default_rng(0), {}
    for name, layer in plan.rounding.layers.items():
        factors = 1 + 0.08 * generator.standard_normal((len(layer.codes), 1))
        wide = np.repeat(factors, layer.scales.shape[1], 1).astype(np.float32)
        off[name] = layer.with_scales(wide, plan.widths[name], plan.quantizer)
    return replace(plan, rounding=replace(plan.rounding, layers=off))


@pytest.mark.parametrize(
    ("target", "share"),
    [
        pytest.param(CPU, 0.5, id="group"),
        # One factor a channel, whose groups cannot answer for themselves.
        pytest.param(LEVELED, 0.7, id="two-level", marks=pytest.mark.slow),
    ],
)
def test_tuning_undoes_scales_that_are_off(
    tiny_policy: OftPolicy, tiny_observations: Make, target: Target, share: float
) -> None:
    seen, others = tiny_observations(8), tiny_observations(4, seed=9)
    plan = coded(tiny_policy, seen, target)
    bad = with_scales_off(plan)
    assert bad.rounding is not None
    off = bad.rounding.layers
    how = TuningSettings(batch_size=4, scale_rate=1e-2)
    tuned = tune_codes(tiny_policy, bad, seen, how)
    assert tuned.rounding is not None
    for name, layer in tuned.rounding.layers.items():
        assert np.array_equal(layer.halves, off[name].halves)
        stored = layer.steps.channel_scales if layer.multipliers is not None else layer.scales
        halves = stored[np.isin(plan.widths[name], [2, 4])]
        assert np.array_equal(halves, halves.astype(np.float16))
        if layer.multipliers is not None and off[name].multipliers is not None:
            assert np.array_equal(layer.multipliers, off[name].multipliers)
    assert tuned.weight_bytes == bad.weight_bytes
    for observations, left in ((seen, share), (others, 0.9)):
        before, after = (judge_plan(tiny_policy, p, observations).rms for p in (bad, tuned))
        assert after < left * before


def test_codes_move_within_their_widths_and_the_policy_is_as_it_was(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    seen = tiny_observations(8)
    plan = with_scales_off(coded(tiny_policy, seen))
    before = {name: value.clone() for name, value in tiny_policy.module.state_dict().items()}
    tuned = tune_codes(
        tiny_policy, plan, seen, TuningSettings(batch_size=4, scale_rate=1e-2, code_rate=0.025)
    )
    assert plan.rounding is not None and tuned.rounding is not None
    moved = 0
    for name, layer in tuned.rounding.layers.items():
        old = plan.rounding.layers[name].codes
        moved += int((layer.codes != old).sum())
        for bits, (low, high) in CODE_RANGE.items():
            codes = layer.codes[plan.widths[name] == bits]
            assert not codes.size or (codes.min() >= low and codes.max() <= high)
        unstored = np.setdiff1d(np.arange(old.shape[1]), plan.stored_order(name))
        assert not layer.codes[:, unstored].any()
        assert not layer.codes[np.isin(plan.widths[name], [0, 16])].any()
    assert moved
    assert all(torch.equal(before[n], v) for n, v in tiny_policy.module.state_dict().items())
    assert not any(weight.requires_grad for weight in tiny_policy.module.parameters())


def test_tokens_come_nearer_to_those_of_the_float_policy(tmp_path: Path) -> None:
    policy = load_openvla_policy(write_tiny_openvla(tmp_path / "checkpoint"))
    seen = openvla_observations(8)
    plan = mixed_plan(policy)
    # At fewer bits other tokens are chosen throughout, by random weights.
    eight = {name: np.full_like(widths, 8) for name, widths in plan.widths.items()}
    plan = replace(plan, quantizer=compensated_spec(CPU), widths=eight)
    plan = round_plan(policy, plan, measure_moments(policy, seen, "c" * 64))
    tuned = tune_codes(policy, plan, seen, TuningSettings(batch_size=4))
    diverged = [
        token_divergence(policy, seen, partial(fake_quantized, policy, some))
        for some in (plan, tuned)
    ]
    before, after = diverged
    assert before is not None and after is not None
    assert after.kl < 0.9 * before.kl


def test_where_nothing_helps_nothing_changes(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    seen = tiny_observations(4)
    plan = coded(tiny_policy, seen)
    wild = TuningSettings(passes=4, scale_rate=5.0, code_rate=5.0)
    assert tune_codes(tiny_policy, plan, seen, wild) is plan


def test_what_cannot_be_tuned_is_refused(tiny_policy: OftPolicy, tiny_observations: Make) -> None:
    seen = tiny_observations(3)
    plan = coded(tiny_policy, seen)
    with pytest.raises(PlanMismatch, match="qvla round"):
        tune_codes(tiny_policy, replace(plan, rounding=None), seen)
    with pytest.raises(QvlaError, match="2 observations at least, got 1"):
        tune_codes(tiny_policy, plan, seen[:1])
    with pytest.raises(QvlaError, match="--quantizer compensated"):
        replace(spec_for(CPU), tuned_codes=True)
    with pytest.raises(ArtifactError, match="now --tune-codes"):
        QuantizerSpec.from_json({**plan.quantizer.to_json(), "tuned_scales": True})


def test_a_run_tunes_its_codes_where_its_plan_says_so(
    tiny_policy: OftPolicy, tiny_checkpoint: Path, tiny_observations: Make, tmp_path: Path
) -> None:
    run, w2 = RunFolder(tmp_path / "run"), parse_setting("w2")
    drawn = tuple(tiny_observations(17))
    CalibrationSet(drawn[:16], drawn[16:], {"test": 1}).save(run.calibration)
    sensitivities(run, tiny_policy, CPU, SensitivityRequest(probes=1))
    plan_setting(run, w2, CPU, tiny_policy.digest)
    plain = round_setting(run, w2, tiny_policy)
    planned = plan_setting(run, w2, CPU, tiny_policy.digest, PlanOptions(tune_codes=True))
    assert plain is not None and planned is not None
    assert BitPlan.load(run.plan(w2)).quantizer.tuned_codes and not plain.quantizer.tuned_codes
    with pytest.raises(QvlaError, match="whole policy in memory"):
        round_setting(run, w2, load_policy(tiny_checkpoint, resident=False))
    tuned = round_setting(run, w2, tiny_policy)
    kept = round_setting(run, w2, tiny_policy)
    assert tuned is not None and tuned.rounding is not None and kept is not None
    assert kept.rounding is not None and kept.rounding.digest == tuned.rounding.digest
    assert tuned.weight_bytes == plain.weight_bytes
    errors = [judge_plan(tiny_policy, p, drawn[:16]).rms for p in (plain, tuned)]
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_engines_have_tuned_codes_and_cross_validation_makes_them(
    tiny_policy: OftPolicy, tiny_observations: Make, tmp_path: Path
) -> None:
    run, w4 = RunFolder(tmp_path / "run"), parse_setting("w4")
    drawn = tuple(tiny_observations(10))
    CalibrationSet(drawn[:8], drawn[8:], {"test": 1}).save(run.calibration)
    sensitivities(run, tiny_policy, CPU, SensitivityRequest(probes=1))
    predicted = []
    for options in (PlanOptions(), PlanOptions(tune_codes=True)):
        plan_setting(run, w4, CPU, tiny_policy.digest, options)
        predicted.append(predict_error(run, w4, tiny_policy))
    assert predicted[0].plan_digest != predicted[1].plan_digest
    assert predicted[0].rms != predicted[1].rms
    tuned = round_setting(run, w4, tiny_policy)
    assert tuned is not None
    bundle = make_bundle(tiny_policy, tuned, drawn[8:], tmp_path / "bundle")
    with load_engine(bundle, threads=1) as engine:
        assert judge(bundle, engine).drift.worst <= 1e-3


def test_specifications_state_what_is_tuned() -> None:
    tuned = replace(compensated_spec(CPU), tuned_codes=True)
    assert QuantizerSpec.from_json(tuned.to_json()) == tuned
    assert "tuned_codes" not in compensated_spec(CPU).to_json()
