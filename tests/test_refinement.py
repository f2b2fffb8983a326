"""Refinement: slopes against measured changes, never a worse plan, limits kept, resumed."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from engines.targets import CPU
from qvla_export.allocation import Budget, allocate_bits, least_error
from qvla_export.errors import QvlaError
from qvla_export.first_order import FirstOrder, measure_first_order
from qvla_export.layers import fake_quantized, traced_layers
from qvla_export.observation import Observation
from qvla_export.plan import BitPlan
from qvla_export.policies.oft import OftPolicy
from qvla_export.quantize import spec_for
from qvla_export.refinement import error_slopes, refine_plan
from qvla_export.sensitivity import Sensitivities

BUDGET = Budget("bits per channel", 3.0)
Observations = list[Observation]


def allocate(table: Sensitivities) -> BitPlan:
    return allocate_bits(table, BUDGET, CPU)


def action_error(policy: OftPolicy, plan: BitPlan, observations: Observations) -> float:
    with torch.no_grad():
        batch = policy.batch(observations)
        expected = policy.normalized_actions(batch)
        with fake_quantized(policy, plan):
            moved = policy.normalized_actions(batch) - expected
    return float(moved.double().square().sum()) / len(observations)


@pytest.fixture(scope="module")
def observations(tiny_observations: Callable[..., Observations]) -> Observations:
    return tiny_observations(6)


@pytest.fixture(scope="module")
def measured(tiny_policy: OftPolicy, observations: Observations) -> Sensitivities:
    settings = FirstOrder(spec_for(CPU), probes=None)
    return measure_first_order(tiny_policy, observations, "c" * 64, settings)


@pytest.fixture(scope="module")
def plan(measured: Sensitivities) -> BitPlan:
    return allocate(measured)


def test_slopes_are_what_a_small_change_does(
    tiny_policy: OftPolicy, observations: Observations, plan: BitPlan
) -> None:
    """Single channels of 4 bits put to 8: the action error changes by the slope, to first order."""
    widths = {name: np.full_like(w, 4) for name, w in plan.widths.items()}
    coarse = replace(plan, widths=widths)
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


def test_the_error_falls_and_the_limits_hold(
    tiny_policy: OftPolicy, observations: Observations, measured: Sensitivities, plan: BitPlan
) -> None:
    before = {name: layer.weight.clone() for name, layer in traced_layers(tiny_policy).items()}
    refined = refine_plan(tiny_policy, observations, measured, plan, allocate, rounds=2)
    for name, layer in traced_layers(tiny_policy).items():
        assert torch.equal(layer.weight, before[name])
        assert not layer.weight.requires_grad
    errors = [action_error(tiny_policy, p, observations) for p in (plan, refined)]
    assert errors[1] < errors[0]
    assert refined.mean_bits_per_channel <= 3.0
    assert refined.sensitivities_digest == plan.sensitivities_digest
    assert refined.expected_error is not None
    assert refined.expected_error >= least_error(measured, BUDGET, CPU) * (1 - 1e-6)
    assert refined.allocation is not None
    rounds = refined.allocation["refinement"]["rounds"]
    assert rounds[0]["error_before"] == pytest.approx(errors[0], rel=1e-3)
    taken = [r["error_after"] for r in rounds if r["error_after"] < r["error_before"]]
    assert taken[-1] == pytest.approx(errors[1], rel=1e-3)


def test_a_plan_that_nothing_improves_stays(
    tiny_policy: OftPolicy, observations: Observations, measured: Sensitivities, plan: BitPlan
) -> None:
    """An allocation that always answers with worse widths: two rounds in vain are enough."""
    worse = replace(plan, widths={name: np.full_like(w, 2) for name, w in plan.widths.items()})
    kept = refine_plan(tiny_policy, observations, measured, plan, lambda table: worse, rounds=9)
    assert all((kept.widths[name] == plan.widths[name]).all() for name in plan.widths)
    assert kept.allocation is not None
    rounds = kept.allocation["refinement"]["rounds"]
    assert len(rounds) == 2
    assert all(each["error_after"] >= each["error_before"] for each in rounds)


def test_a_killed_refinement_goes_on_where_it_was(
    tiny_policy: OftPolicy,
    observations: Observations,
    measured: Sensitivities,
    plan: BitPlan,
    tmp_path: Path,
) -> None:
    journal = tmp_path / "plan.progress"
    whole = refine_plan(tiny_policy, observations, measured, plan, allocate, rounds=2)

    def killed(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        refine_plan(tiny_policy, observations, measured, plan, allocate, 2, journal, killed)
    seen: list[int] = []
    again = refine_plan(
        tiny_policy,
        observations,
        measured,
        plan,
        allocate,
        2,
        journal,
        lambda done, total: seen.append(done),
    )
    assert seen == [2]
    assert again.digest == whole.digest
    # Another plan's journal, or a damaged one, is not gone on from.
    other = allocate_bits(measured, Budget("bits per channel", 4.0), CPU)
    assert BitPlan.load(journal).digest == again.digest
    refine_plan(tiny_policy, observations, measured, other, lambda table: other, 1, journal)
    assert BitPlan.load(journal).allocation != again.allocation
    journal.write_text("{")
    final = refine_plan(tiny_policy, observations, measured, plan, allocate, 2, journal)
    assert final.digest == whole.digest


def test_nothing_to_refine_on_is_refused(
    tiny_policy: OftPolicy, measured: Sensitivities, plan: BitPlan, observations: Observations
) -> None:
    with pytest.raises(QvlaError, match="at least one round, got 0 and 1"):
        refine_plan(tiny_policy, [], measured, plan, allocate, 1)
    with pytest.raises(QvlaError, match="got 6 and 0"):
        refine_plan(tiny_policy, observations, measured, plan, allocate, 0)
