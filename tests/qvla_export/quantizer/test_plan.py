"""Algorithm 1 against its printed pseudo-code, the plan's averages, its file and its refusals."""

import heapq
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_plans import (
    FOUR_BIT_TARGET,
    TARGET,
    random_sensitivities,
    tables,
    widths_of,
)

from qvla_export.allocation.allocate import Budget, PruningRule, allocate_bits
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import ArtifactError, PlanMismatch, QvlaError
from qvla_export.shared.target import WIDTHS, Container


def algorithm_1(table: Sensitivities, mean_bits: float) -> list[int]:
    """The paper's pseudo-code, line by line; ties go to the lower channel."""
    error = {
        bits: np.concatenate([table.at(name, bits) for name in table.values]).astype(float)
        for bits in WIDTHS
    }
    count = len(error[16])
    bits_of = [16] * count
    excess = 16 * count - mean_bits * count
    following = {16: 8, 8: 4, 4: 2, 2: 0}

    def rho(channel: int, high: int, low: int) -> float:
        return float((error[low][channel] - error[high][channel]) / (high - low))

    heap = [(rho(c, 16, 8), c, 16, 8) for c in range(count)]
    heapq.heapify(heap)
    while excess > 1e-6 and heap:
        _, channel, high, low = heapq.heappop(heap)
        if bits_of[channel] == high:
            bits_of[channel] = low
            excess -= high - low
            if low in following:
                step = (low, following[low])
                heapq.heappush(heap, (rho(channel, *step), channel, *step))
    return bits_of


@settings(deadline=None, max_examples=300)
@given(tables(), st.floats(0, 16))
def test_allocation_is_algorithm_1(table: Sensitivities, mean_bits: float) -> None:
    budget = Budget("bits per channel", mean_bits)
    plan = allocate_bits(table, budget, TARGET, method="algorithm1")
    assert widths_of(plan).tolist() == algorithm_1(table, mean_bits)


@settings(deadline=None)
@given(tables(), st.floats(0, 16), st.floats(0, 16))
def test_lower_budgets_never_raise_a_channel(
    table: Sensitivities, one: float, other: float
) -> None:
    for kind, scale in (("bits per channel", 1.0), ("bits per weight", 1.0), ("bytes", 200.0)):
        low, high = (
            widths_of(allocate_bits(table, Budget(kind, value * scale), TARGET))
            for value in sorted((one, other))
        )
        assert (low <= high).all()


def two_bit_filling(plan: BitPlan) -> int:
    """Most bytes of the columns that fill 2-bit buckets up to fours: no channel's own bytes."""
    return sum(3 * TARGET.containers[2].row_bits(k) // 8 for k in plan.weights_per_channel.values())


@pytest.mark.parametrize("mean_bits", [2.0, 3.0, 4.0, 8.0])
def test_budgets_are_met_in_their_own_unit(mean_bits: float) -> None:
    table = random_sensitivities(0)
    table = replace(table, weights_per_channel={"layer.0": 64, "layer.1": 640})
    by_channel = allocate_bits(table, Budget("bits per channel", mean_bits), TARGET)
    assert mean_bits - 8 / 64 < by_channel.mean_bits_per_channel <= mean_bits
    by_weight = allocate_bits(table, Budget("bits per weight", mean_bits), TARGET)
    assert mean_bits - 0.3 < by_weight.mean_bits_per_weight <= mean_bits
    allowed = int(by_weight.float16_bytes * mean_bits / 16)
    by_bytes = allocate_bits(table, Budget("bytes", allowed), TARGET)
    assert 0.9 * allowed - two_bit_filling(by_bytes) < by_bytes.weight_bytes <= allowed


def test_four_mean_bits_can_also_hold_a_stored_ratio() -> None:
    table = random_sensitivities(1, (200, 300))
    free = allocate_bits(table, Budget("bits per channel", 4.0), TARGET)
    assert free.ratio > 0.25
    limit = free.ratio - 0.02
    capped = allocate_bits(table, Budget("bits per channel", 4.0, max_stored_ratio=limit), TARGET)
    filling = two_bit_filling(capped) / capped.float16_bytes
    assert limit - 0.005 - filling < capped.ratio <= limit
    assert capped.mean_bits_per_channel <= 4.0
    assert (widths_of(capped) <= widths_of(free)).all()
    assert "stored at most" in capped.budget


def test_expected_error_is_the_sum_of_the_assigned_sensitivities() -> None:
    table = random_sensitivities(2)
    plan = allocate_bits(table, Budget("bits per channel", 3.0), TARGET)
    total = sum(
        float(table.at(name, int(bits))[channel])
        for name, widths in plan.widths.items()
        for channel, bits in enumerate(widths)
    )
    assert plan.expected_error == pytest.approx(total, rel=1e-5)
    uniform = sum(float(table.at(name, 4).sum()) for name in table.values)
    by_channel = allocate_bits(table, Budget("bits per channel", 4.0), TARGET)
    assert by_channel.expected_error is not None and by_channel.expected_error < uniform


def test_a_width_stored_like_a_wider_one_is_not_used_where_bytes_count() -> None:
    table = random_sensitivities(3)
    by_bytes = allocate_bits(table, Budget("bytes", 1500), FOUR_BIT_TARGET)
    assert by_bytes.histogram()[2] == 0
    by_channel = allocate_bits(table, Budget("bits per channel", 3), FOUR_BIT_TARGET)
    assert by_channel.histogram()[2] > 0


def test_pruning_rules_hold() -> None:
    table = random_sensitivities(4)
    budget = Budget("bits per channel", 1.6)
    free = allocate_bits(table, budget, TARGET)
    pruned = (widths_of(free) == 0).sum()
    assert pruned > 16

    def plan(rule: PruningRule) -> BitPlan:
        return allocate_bits(table, budget, TARGET, pruning=rule)

    capped = plan(PruningRule(max_share_of_layer=0.25))
    for widths in capped.widths.values():
        assert (widths == 0).sum() <= 0.25 * len(widths)
    assert (widths_of(plan(PruningRule(max_share=0.21))) == 0).sum() == int(0.21 * 64)
    absolute = plan(PruningRule(absolute_threshold=0.8))
    relative = plan(PruningRule(relative_threshold=0.3))
    for name in table.values:
        at_zero = table.at(name, 0)
        assert at_zero[absolute.widths[name] == 0].max(initial=0) <= 0.8
        assert at_zero[relative.widths[name] == 0].max(initial=0) <= 0.3 * at_zero.mean()


def test_impossible_budgets_say_what_is_reachable() -> None:
    table = random_sensitivities(5)
    with pytest.raises(QvlaError, match=r"cannot be met.*raise the budget"):
        allocate_bits(table, Budget("bits per channel", 1), TARGET, widths=(16, 8, 4))
    with pytest.raises(QvlaError, match="cannot be met"):
        allocate_bits(
            table, Budget("bits per channel", 0.5), TARGET, pruning=PruningRule(max_share=0.1)
        )
    with pytest.raises(QvlaError, match="one of them above 0"):
        allocate_bits(table, Budget("bits per channel", 4), TARGET, widths=(0,))
    with pytest.raises(QvlaError, match="a budget is one of"):
        Budget("bits", 4)  # type: ignore[arg-type]


def test_averages_of_a_uniform_plan() -> None:
    plan = uniform_plan({"a": (10, 128), "b": (6, 100)}, 4, TARGET, "p")
    weights = 10 * 128 + 6 * 100
    bits = 4 * weights + 16 * 2 * 32
    assert plan.mean_bits_per_channel == plan.mean_bits_per_weight == 4
    assert plan.weight_bytes == bits // 8
    assert plan.stored_bits_per_weight == pytest.approx(bits / weights)
    assert plan.float16_bytes == 2 * weights
    assert plan.ratio == pytest.approx(bits / 16 / weights, rel=1e-3)
    assert plan.histogram() == {0: 0, 2: 0, 4: 16, 8: 0, 16: 0}


def test_save_and_load(tmp_path: Path) -> None:
    plan = allocate_bits(random_sensitivities(6), Budget("bits per channel", 4), TARGET)
    plan.save(tmp_path / "plan.json")
    loaded = BitPlan.load(tmp_path / "plan.json")
    assert widths_of(loaded).tolist() == widths_of(plan).tolist()
    assert list(loaded.widths) == list(plan.widths)
    for name in ("target", "containers", "quantizer", "budget", "policy_digest", "ratio"):
        assert getattr(loaded, name) == getattr(plan, name)
    assert loaded.sensitivities_digest == plan.sensitivities_digest
    first = (tmp_path / "plan.json").read_bytes()
    loaded.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["layers"]["layer.0"].update(widths="3" * 24), "damaged"),
        (lambda v: v["layers"]["layer.0"].update(widths="4"), "weight bytes"),
        (lambda v: v["layers"]["layer.0"].update(widths=""), "of one channel or more"),
        (lambda v: v.pop("containers"), "lacks"),
        (lambda v: v.update(format="other"), "not a bit plan"),
        (lambda v: v.update(format="qvla-plan-1"), "leave out the order of channels.*qvla plan"),
        (lambda v: v.update(weight_bytes=1), "counted other bytes.*1 weight bytes.*qvla plan"),
        (lambda v: v.update(layers=[]), "damaged"),
        (lambda v: v["containers"].pop("4"), "damaged"),
    ],
)
def test_damaged_plans_are_refused(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "plan.json"
    allocate_bits(random_sensitivities(7), Budget("bits per channel", 4), TARGET).save(path)
    value = json.loads(path.read_text())
    assert callable(change)
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(ArtifactError, match=message):
        BitPlan.load(path)
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        BitPlan.load(path)


def test_a_plan_for_another_policy_is_refused() -> None:
    shapes = {"model.layers.0.up": (8, 64), "model.layers.0.down": (4, 128)}
    plan = uniform_plan(shapes, 8, TARGET, "a" * 64)
    plan.require_fits(shapes, "a" * 64)
    with pytest.raises(PlanMismatch, match=r"aaaaaaaa.*bbbbbbbb.*weights differ"):
        plan.require_fits(shapes, "b" * 64)
    renamed = {"model.layers.0.up": (8, 64), "model.layers.1.down": (4, 128)}
    with pytest.raises(PlanMismatch, match=r"'model.layers.0.down'.*nearest is.*layers.1.down"):
        plan.require_fits(renamed, "a" * 64)
    with pytest.raises(PlanMismatch, match=r"not in the plan"):
        plan.require_fits({**shapes, "more": (1, 1)}, "a" * 64)
    with pytest.raises(PlanMismatch, match="8 channels of 32 weights"):
        plan.require_fits({**shapes, "model.layers.0.up": (8, 32)}, "a" * 64)


def test_unknown_widths_are_refused() -> None:
    with pytest.raises(QvlaError, match=r"got \[3\] in a"):
        uniform_plan({"a": (4, 8)}, 3, TARGET, "p")
    without = replace(TARGET, containers={16: Container(16, None, 0)})
    with pytest.raises(QvlaError, match="on target 'test', got"):
        uniform_plan({"a": (4, 8)}, 4, without, "p")
