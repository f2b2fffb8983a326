"""Refinement: slopes against measured changes, never a worse plan, limits kept, resumed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY_SIZE, write_tiny_checkpoint

from calibration.samples import CalibrationSet
from engines.targets import CPU
from qvla_export.allocation import Budget, allocate_bits, least_error
from qvla_export.cli import compensating, stages
from qvla_export.error_slopes import error_slopes
from qvla_export.errors import QvlaError
from qvla_export.estimators.first_order import FirstOrderEstimator
from qvla_export.first_order import FirstOrder, measure_first_order
from qvla_export.layers import fake_quantized, layer_shapes, traced_layers
from qvla_export.moment_measurement import measure_moments
from qvla_export.observation import Observation
from qvla_export.plan import BitPlan, uniform_plan
from qvla_export.policies.oft import OftPolicy, load_oft_policy
from qvla_export.quantize import compensated_spec, spec_for
from qvla_export.refinement import Evidence, Trial, refine_plan, rounds_in
from qvla_export.rounded_plan import round_plan
from qvla_export.run_folder import RunFolder, parse_setting
from qvla_export.sensitivity import Sensitivities

FULL = compensated_spec(CPU)
BUDGET = Budget("bits per channel", 3.0)
DIGEST = "c" * 64
Observations = list[Observation]
OnProgress = Callable[[int, int], None]
# Rounding takes its time: fewer layers than the other tests' policy.
SMALL = replace(TINY_SIZE, vision_depth=2, depth=1)


def allocate(table: Sensitivities) -> BitPlan:
    return allocate_bits(table, BUDGET, CPU)


def action_error(policy: OftPolicy, plan: BitPlan, observations: Observations) -> float:
    with torch.no_grad():
        batch = policy.batch(observations)
        expected = policy.normalized_actions(batch)
        with fake_quantized(policy, plan):
            moved = policy.normalized_actions(batch) - expected
    return float(moved.double().square().sum()) / len(observations)


def typical_error(policy: OftPolicy, plan: BitPlan, observations: Observations) -> float:
    errors = [action_error(policy, plan, [observation]) for observation in observations]
    return float(np.exp(np.log(errors).mean()))


@dataclass(frozen=True)
class Case:
    """What is refined, by what."""

    policy: OftPolicy
    evidence: Evidence
    measured: Sensitivities
    plan: BitPlan

    def refined(
        self, rounds: int, journal: Path | None = None, told: OnProgress | None = None
    ) -> BitPlan:
        arguments = (self.policy, self.evidence, self.measured, self.plan, allocate)
        return refine_plan(*arguments, rounds, journal, told)

    def errors(self, plan: BitPlan) -> list[float]:
        found = []
        for trial in self.evidence.trials:
            tried = plan
            if trial.moments is not None:
                tried = round_plan(self.policy, plan, trial.moments)
            found.append(typical_error(self.policy, tried, list(trial.observations)))
        return found


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> OftPolicy:
    path = tmp_path_factory.mktemp("small") / "checkpoint"
    return load_oft_policy(write_tiny_checkpoint(path, size=SMALL))


@pytest.fixture(scope="module")
def observations(tiny_observations: Callable[..., Observations]) -> Observations:
    return tiny_observations(6)


@pytest.fixture(scope="module", params=["nearest", "compensated"])
def case(
    request: pytest.FixtureRequest,
    policy: OftPolicy,
    observations: Observations,
    tiny_observations: Callable[..., Observations],
) -> Case:
    others = tiny_observations(12, seed=1)
    moments, quantizer, trials = None, spec_for(CPU), [Trial(others[:6]), Trial(others[6:])]
    if request.param == "compensated":
        moments, quantizer = measure_moments(policy, observations, DIGEST), FULL
        trials = [Trial(others, moments)]
    settings = FirstOrder(quantizer, moments=moments)
    measured = measure_first_order(policy, observations, DIGEST, settings)
    return Case(policy, Evidence(observations, trials), measured, allocate(measured))


@pytest.fixture(scope="module")
def refined(case: Case) -> BitPlan:
    return case.refined(rounds=2)


def test_slopes_are_what_a_small_change_does(
    tiny_policy: OftPolicy, observations: Observations
) -> None:
    """Single channels of 4 bits put to 8: the action error changes by the slope, to first order."""
    shapes = layer_shapes(traced_layers(tiny_policy))
    coarse = uniform_plan(shapes, 4, CPU, tiny_policy.digest, spec_for(CPU))
    widths = coarse.widths
    with torch.no_grad():
        reference = [tiny_policy.normalized_actions(tiny_policy.batch(observations))]
    slopes = error_slopes(tiny_policy, [observations], reference, coarse)
    before = action_error(tiny_policy, coarse, observations)
    found, expected = [], []
    for name, slope in slopes.items():
        if name.endswith(("fc1", "gate_proj", "up_proj")):
            continue  # their widths also order the inputs of the layer behind them
        assert (slope[2] == 0).all(), "nothing changes at the plan's own width"
        steepest = int(np.abs(slope[3]).argmax())
        changed = widths[name].copy()
        changed[steepest] = 8
        finer = replace(coarse, widths={**widths, name: changed})
        found.append(action_error(tiny_policy, finer, observations) - before)
        expected.append(slope[3, steepest])
    assert np.corrcoef(found, expected)[0, 1] > 0.98
    scale = np.dot(found, expected) / np.dot(expected, expected)
    # The square that a slope leaves out is positive, most of these slopes are not.
    assert 0.7 < scale < 1.05


def test_no_worse_where_it_is_decided_and_within_the_limits(case: Case, refined: BitPlan) -> None:
    rounds = rounds_in(refined)
    before, after = case.errors(case.plan), case.errors(refined)
    assert rounds[0].errors_before == pytest.approx(before, rel=0.02)
    taken = [each.errors_after for each in rounds if each.accepted]
    assert after == pytest.approx([before, *taken][-1], rel=0.02)
    assert all(new <= 1.02 * old for old, new in zip(before, after, strict=True))
    assert refined.mean_bits_per_channel <= 3.0
    assert refined.rounding is None
    assert refined.quantizer == case.plan.quantizer
    assert refined.sensitivities_digest == case.plan.sensitivities_digest
    assert refined.expected_error is not None
    assert refined.expected_error >= least_error(case.measured, BUDGET, CPU) * (1 - 1e-6)


def test_a_plan_that_nothing_improves_stays(case: Case) -> None:
    """An allocation that always answers with worse widths: two rounds in vain are enough."""
    plan = case.plan
    worse = replace(plan, widths={name: np.full_like(w, 2) for name, w in plan.widths.items()})
    kept = refine_plan(case.policy, case.evidence, case.measured, plan, lambda table: worse, 9)
    assert all((kept.widths[name] == plan.widths[name]).all() for name in plan.widths)
    rounds = rounds_in(kept)
    assert len(rounds) == 2
    assert not any(each.accepted for each in rounds)


def test_a_killed_refinement_goes_on_where_it_was(
    case: Case, refined: BitPlan, tmp_path: Path
) -> None:
    journal = tmp_path / "plan.progress"
    before = {name: layer.weight.clone() for name, layer in traced_layers(case.policy).items()}

    def killed(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        case.refined(2, journal, killed)
    for name, layer in traced_layers(case.policy).items():
        assert torch.equal(layer.weight, before[name])
        assert not layer.weight.requires_grad
    seen: list[int] = []
    again = case.refined(2, journal, lambda done, total: seen.append(done))
    assert seen == [2]
    assert again.digest == refined.digest == BitPlan.load(journal).digest


def test_what_is_no_journal_of_the_plan_is_not_gone_on_from(
    case: Case, refined: BitPlan, tmp_path: Path
) -> None:
    journal = tmp_path / "plan.progress"
    other = allocate_bits(case.measured, Budget("bits per channel", 4.0), CPU)
    for text in (None, "{"):
        refined.save(journal)
        if text is not None:
            journal.write_text(text)
        arguments = (case.policy, case.evidence, case.measured, other, lambda table: other)
        made = refine_plan(*arguments, 1, journal)
        assert len(rounds_in(made)) == 1
        assert BitPlan.load(journal).digest == made.digest


def test_nothing_to_refine_with_is_refused(case: Case, observations: Observations) -> None:
    for fitted, deciding in (([], observations), (observations, [])):
        with pytest.raises(QvlaError, match=r"others to decide by, got .*qvla calibrate --count"):
            Evidence(fitted, [Trial(deciding)])
    with pytest.raises(QvlaError, match="at least one round, got 0"):
        case.refined(rounds=0)
    if case.plan.quantizer.needs_moments:
        bare = replace(case, evidence=Evidence(observations, [Trial(observations)]))
        with pytest.raises(QvlaError, match="measure that first, qvla moments"):
            bare.refined(rounds=1)


def test_a_setting_is_refined_and_its_codes_are_of_the_refined_plan(
    policy: OftPolicy, tiny_observations: Callable[..., Observations], tmp_path: Path
) -> None:
    run, setting = RunFolder(tmp_path / "run"), parse_setting("w3-refined")
    drawn = tiny_observations(8)
    CalibrationSet(tuple(drawn[:6]), tuple(drawn[6:]), {}, (2, 2, 2)).save(run.calibration)
    estimator = FirstOrderEstimator()
    stages.sensitivities(run, policy, CPU, estimator, 0, compensated=True)

    def planned() -> BitPlan:
        made = stages.plan(run, setting, CPU, policy.digest, policy=policy, refinements=1)
        assert made is not None
        return made

    made = planned()
    assert len(rounds_in(made)) == 1
    assert made.mean_bits_per_channel <= 3.0
    rounded = compensating.rounded(run, setting, policy)
    assert rounded is not None and rounded.rounding is not None
    assert rounded.rounding.plan_digest == made.digest
    stamp = run.rounding(setting).stat().st_mtime_ns
    assert not run.plan(setting).with_suffix(".progress").exists()
    # Asked for again, it is kept, and so are its codes.
    run.half_moments(0).unlink()
    assert planned().digest == made.digest
    assert not run.half_moments(0).exists()
    compensating.rounded(run, setting, policy)
    assert run.rounding(setting).stat().st_mtime_ns == stamp
    CalibrationSet(tuple(drawn[:2]), tuple(drawn[2:]), {}, (2,)).save(run.calibration)
    stages.sensitivities(run, policy, CPU, estimator, 0, compensated=True)
    with pytest.raises(QvlaError, match="has 1 episode: draw more with qvla calibrate --count"):
        planned()
