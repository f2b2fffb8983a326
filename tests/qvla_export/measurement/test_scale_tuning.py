"""Scales that are tuned together: the same codes, less action error, what cannot be tuned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_bundles import make_bundle, mixed_plan

from calibration.calibration_set import CalibrationSet
from engines.load import load_engine
from engines.targets import CPU
from engines.verify import judge
from qvla_export.allocation.setting import parse_setting
from qvla_export.measurement import scale_tuning
from qvla_export.measurement.measure_moments import measure_moments
from qvla_export.measurement.scale_tuning import TuningSettings, tune_scales
from qvla_export.pipeline.deployment.cross_validation import predict_error
from qvla_export.pipeline.fake_quantized import judge_plan
from qvla_export.pipeline.plan import PlanOptions
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.round import round_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.families import load_policy
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import QuantizerSpec, compensated_spec, spec_for
from qvla_export.quantizer.round_plan import round_plan
from qvla_export.shared.errors import PlanMismatch, QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target

Make = Callable[..., list[Observation]]
LEVELED = CPU.with_two_level_scales()


def coded(policy: OftPolicy, seen: list[Observation], target: Target = CPU) -> BitPlan:
    """Return a plan of all widths with its codes."""
    quantizer = replace(compensated_spec(target), tuned_scales=True)
    plan = replace(mixed_plan(policy), quantizer=quantizer, containers=dict(target.containers))
    return round_plan(policy, plan, measure_moments(policy, seen, "c" * 64))


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
    assert plan.rounding is not None
    generator = np.random.default_rng(0)
    # By 8 % a channel, by which all actions move far more than by the codes.
    off = {}
    for name, layer in plan.rounding.layers.items():
        factors = 1 + 0.08 * generator.standard_normal((len(layer.codes), 1))
        wide = np.repeat(factors, layer.scales.shape[1], 1).astype(np.float32)
        off[name] = layer.with_scales(wide, plan.widths[name], plan.quantizer)
    bad = replace(plan, rounding=replace(plan.rounding, layers=off))
    tuned = tune_scales(tiny_policy, bad, seen)
    assert tuned.rounding is not None
    for name, layer in tuned.rounding.layers.items():
        assert np.array_equal(layer.codes, off[name].codes)
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


def test_shares_say_which_observations_count(
    tiny_policy: OftPolicy, tiny_observations: Make
) -> None:
    seen = tiny_observations(4)
    plan, first = coded(tiny_policy, seen), np.repeat([1.999, 0.001], 2)
    few = TuningSettings(probes=4)
    errors = [
        [
            judge_plan(tiny_policy, tune_scales(tiny_policy, plan, seen, how, few), some).rms
            for some in (seen[:2], seen[2:])
        ]
        for how in (first, first[::-1].copy())
    ]
    assert errors[0][0] < errors[1][0] and errors[1][1] < errors[0][1]


def test_what_cannot_be_tuned_is_refused(
    tiny_policy: OftPolicy, tiny_observations: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tiny_observations(3)
    plan = coded(tiny_policy, seen)
    with pytest.raises(PlanMismatch, match="qvla round"):
        tune_scales(tiny_policy, replace(plan, rounding=None), seen)
    with pytest.raises(QvlaError, match="2 observations at least, got 1"):
        tune_scales(tiny_policy, plan, seen[:1])
    with pytest.raises(QvlaError, match="--quantizer compensated"):
        replace(spec_for(CPU), tuned_scales=True)
    monkeypatch.setattr(scale_tuning, "_MOST_BYTES", 1000)
    with pytest.raises(QvlaError, match="plan without --tune-scales"):
        tune_scales(tiny_policy, plan, seen)
    rules = dict(plan.quantizer.rules)
    mixed = {**rules, 2: replace(rules[2], group_size=32)}
    with pytest.raises(QvlaError, match=r"of one size, got \[32, 64\]"):
        tune_scales(
            tiny_policy, replace(plan, quantizer=replace(plan.quantizer, rules=mixed)), seen
        )


def test_a_run_tunes_its_scales_where_its_plan_says_so(
    tiny_policy: OftPolicy, tiny_checkpoint: Path, tiny_observations: Make, tmp_path: Path
) -> None:
    run, w4 = RunFolder(tmp_path / "run"), parse_setting("w4")
    drawn = tuple(tiny_observations(9))
    CalibrationSet(drawn[:8], drawn[8:], {"test": 1}).save(run.calibration)
    sensitivities(run, tiny_policy, CPU, SensitivityRequest(probes=1))
    plan_setting(run, w4, CPU, tiny_policy.digest)
    plain = round_setting(run, w4, tiny_policy)
    planned = plan_setting(run, w4, CPU, tiny_policy.digest, PlanOptions(tune_scales=True))
    assert plain is not None and planned is not None
    assert BitPlan.load(run.plan(w4)).quantizer.tuned_scales and not plain.quantizer.tuned_scales
    with pytest.raises(QvlaError, match="whole policy in memory"):
        round_setting(run, w4, load_policy(tiny_checkpoint, resident=False))
    tuned = round_setting(run, w4, tiny_policy)
    kept = round_setting(run, w4, tiny_policy)
    assert tuned is not None and tuned.rounding is not None and kept is not None
    assert kept.rounding is not None and kept.rounding.digest == tuned.rounding.digest
    assert tuned.weight_bytes == plain.weight_bytes
    errors = [judge_plan(tiny_policy, p, drawn[:8]).rms for p in (plain, tuned)]
    assert errors[1] < errors[0]


@pytest.mark.slow
def test_engines_have_tuned_scales_and_cross_validation_makes_them(
    tiny_policy: OftPolicy, tiny_observations: Make, tmp_path: Path
) -> None:
    run, w4 = RunFolder(tmp_path / "run"), parse_setting("w4")
    drawn = tuple(tiny_observations(10))
    CalibrationSet(drawn[:8], drawn[8:], {"test": 1}).save(run.calibration)
    sensitivities(run, tiny_policy, CPU, SensitivityRequest(probes=1))
    predicted = []
    for options in (PlanOptions(), PlanOptions(tune_scales=True)):
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
    tuned = replace(compensated_spec(CPU), tuned_scales=True)
    assert QuantizerSpec.from_json(tuned.to_json()) == tuned
    assert "tuned_scales" not in compensated_spec(CPU).to_json()
