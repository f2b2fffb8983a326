"""The convex-hull allocation against brute force, its bound, caps, and size."""

import tracemalloc
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_plans import FOUR_BIT_TARGET, TARGET, random_sensitivities, tables, widths_of

from qvla_export.allocation.allocate import Budget, PruningRule, allocate_bits, least_error
from qvla_export.allocation.hull import hull_jumps
from qvla_export.latency_model.published_sizes import TransformerSize, llama_layers
from qvla_export.quantizer.column_order import column_order
from qvla_export.quantizer.packed_storage import stored_columns
from qvla_export.quantizer.plan import BitPlan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS

Costs = NDArray[np.float64]


def error_table(table: Sensitivities) -> dict[int, NDArray[np.float64]]:
    return {
        bits: np.concatenate([table.at(name, bits) for name in table.values]).astype(float)
        for bits in WIDTHS
    }


def best_error(table: Sensitivities, mean_bits: float) -> float:
    """Least sum of errors within a mean, by dynamic programming over the bits spent."""
    errors = error_table(table)
    channels = len(errors[16])
    allowed = int(np.floor(mean_bits * channels + 1e-6))
    best = np.zeros(allowed + 1)
    for channel in range(channels):
        following = np.full(allowed + 1, np.inf)
        for bits in WIDTHS:
            if bits <= allowed:
                reached = best[: allowed + 1 - bits] + errors[bits][channel]
                following[bits:] = np.minimum(following[bits:], reached)
        best = following
    return float(best.min())


def relaxed_error(table: Sensitivities, mean_bits: float) -> float:
    """Optimum of the linear program: the largest Lagrangian bound over all slopes of the table."""
    errors = np.stack([error_table(table)[bits] for bits in WIDTHS])
    cost = np.array(WIDTHS, float)[:, None]
    excess = mean_bits * errors.shape[1]
    slopes = [0.0]
    for low, high in product(range(len(WIDTHS)), repeat=2):
        if low < high:
            rises = (errors[low] - errors[high]) / (WIDTHS[high] - WIDTHS[low])
            slopes += rises[rises > 0].tolist()
    return max(float((errors + s * cost).min(axis=0).sum() - s * excess) for s in slopes)


@settings(max_examples=100)
@given(tables(), st.floats(0.2, 16))
def test_the_bound_is_the_linear_programs_and_at_most_one_jump_below_the_hulls_plan(
    table: Sensitivities, mean_bits: float
) -> None:
    budget = Budget("bits per channel", mean_bits)
    bound = least_error(table, budget, TARGET)
    best = best_error(table, mean_bits)
    assert bound == pytest.approx(relaxed_error(table, mean_bits), rel=1e-6, abs=1e-6)
    assert bound <= best + 1e-6
    for method in ("algorithm1", "hull"):
        plan = allocate_bits(table, budget, TARGET, method=method)
        assert plan.mean_bits_per_channel <= mean_bits + 1e-6
        assert plan.expected_error is not None and plan.expected_error >= best - 1e-6
    # The last plan is the hull's.
    largest = max(float(errors.max()) for errors in error_table(table).values())
    assert plan.expected_error <= bound + largest + 1e-6


@given(
    st.integers(1, 4).flatmap(
        lambda n: st.tuples(
            st.lists(st.integers(0, 6), min_size=4 * n, max_size=4 * n),
            st.lists(st.integers(0, 6), min_size=4 * n, max_size=4 * n),
            st.lists(st.booleans(), min_size=4 * n, max_size=4 * n),
        )
    )
)
def test_jumps_visit_exactly_the_lower_hull(drawn: tuple[list[int], list[int], list[bool]]) -> None:
    """Any costs, in any order, ties and forbidden levels included; all start at an exact one."""
    cost, errors = (np.array(values, float).reshape(4, -1) for values in drawn[:2])
    errors[0] = 0
    allowed = np.array(drawn[2]).reshape(4, -1)
    start = np.zeros(cost.shape[1], np.int8)
    jumps = hull_jumps(cost, errors, start, allowed)
    slopes = jumps.errors / jumps.savings
    assert (np.diff(slopes) >= -1e-12).all()
    assert (jumps.savings > 0).all()
    levels = start.copy()
    for count in range(len(jumps.channel) + 1):
        taken = jumps.levels_after(start, count)
        if count:
            channel = jumps.channel[count - 1]
            assert allowed[taken[channel], channel]
            levels[channel] = taken[channel]
        assert (taken == levels).all()
        spent = cost[levels, np.arange(len(levels))].sum()
        total = errors[levels, np.arange(len(levels))].sum()
        # No choice is cheaper and better: each prefix is an optimum for what it spends.
        for other in product(*(np.flatnonzero(a | (np.arange(4) == 0)) for a in allowed.T)):
            chosen = np.array(other)
            if cost[chosen, np.arange(len(chosen))].sum() <= spent:
                reached = errors[chosen, np.arange(len(chosen))].sum()
                assert reached >= total - 1e-9


def order_bytes(plan: BitPlan) -> int:
    """Bytes that restore the order of a plan's channels; its layers are stored one by one."""
    found = 0
    for widths in plan.widths.values():
        used = [bits for bits in np.unique(widths)[::-1].tolist() if bits]
        counts = {bits: int((widths == bits).sum()) for bits in used}
        columns = [stored_columns(n, plan.containers[bits]) for bits, n in counts.items()]
        found += column_order(widths, columns, [len(widths)]).nbytes
    return found


@pytest.mark.parametrize("kind", ["bits per channel", "bits per weight", "bytes"])
def test_all_budgets_are_met_close_to_their_bound(kind: str) -> None:
    table = random_sensitivities(0, (3000, 5000))
    table = replace(table, weights_per_channel={"layer.0": 64, "layer.1": 640})
    weights = 3000 * 64 + 5000 * 640
    for mean_bits in (1.5, 3.0, 6.0):
        value = mean_bits * weights / 8 if kind == "bytes" else mean_bits
        budget = Budget(kind, value)  # type: ignore[arg-type]  # a Literal
        plan = allocate_bits(table, budget, FOUR_BIT_TARGET, method="hull")
        spent = {
            "bits per channel": plan.mean_bits_per_channel,
            "bits per weight": plan.mean_bits_per_weight,
            "bytes": plan.weight_bytes,
        }[kind]
        assert spent <= value * (1 + 1e-9)
        bound = least_error(table, budget, FOUR_BIT_TARGET)
        assert plan.expected_error is not None
        # A plan's order is stored from the same bytes; the bound is close for what that leaves.
        left = replace(budget, value=value - order_bytes(plan)) if kind == "bytes" else budget
        close = least_error(table, left, FOUR_BIT_TARGET)
        assert bound <= close
        assert close * (1 - 1e-9) <= plan.expected_error <= close * 1.002
        greedy = allocate_bits(table, budget, FOUR_BIT_TARGET, method="algorithm1").expected_error
        assert greedy is not None and greedy >= bound * (1 - 1e-9)


def test_a_stored_ratio_follows_the_budget() -> None:
    table = random_sensitivities(1)
    budget = Budget("bits per channel", 8.0, max_stored_ratio=0.3)
    plan = allocate_bits(table, budget, TARGET, method="hull")
    assert plan.ratio <= 0.3
    free = allocate_bits(table, Budget("bits per channel", 8.0), TARGET, method="hull")
    assert (widths_of(plan) <= widths_of(free)).all()


@pytest.mark.parametrize(
    "rule",
    [
        PruningRule(max_share_of_layer=0.2),
        PruningRule(max_share=0.1),
        PruningRule(max_share_of_layer=0.3, max_share=0.15),
        PruningRule(absolute_threshold=0.5),
        PruningRule(relative_threshold=0.5, max_share_of_layer=0.4),
    ],
)
def test_pruning_rules_hold(rule: PruningRule) -> None:
    table = random_sensitivities(2, (40, 60))
    plan = allocate_bits(
        table, Budget("bits per channel", 2.2), TARGET, pruning=rule, method="hull"
    )
    assert 1.5 < plan.mean_bits_per_channel <= 2.2
    pruned = {name: widths == 0 for name, widths in plan.widths.items()}
    assert any(p.any() for p in pruned.values())
    assert sum(p.sum() for p in pruned.values()) <= rule.max_share * 100
    for name, where in pruned.items():
        errors = table.at(name, 0)
        assert where.mean() <= rule.max_share_of_layer
        if rule.absolute_threshold is not None:
            assert (errors[where] <= rule.absolute_threshold).all()
        if rule.relative_threshold is not None:
            assert (errors[where] <= rule.relative_threshold * errors.mean()).all()


def test_what_cannot_be_met_is_refused() -> None:
    table = random_sensitivities(3)
    with pytest.raises(QvlaError, match="cannot be met: 32 bits allowed, the least"):
        allocate_bits(
            table,
            Budget("bits per channel", 0.5),
            TARGET,
            widths=(16, 8, 4, 2),
            method="hull",
        )
    assert least_error(table, Budget("bits per channel", 0.5), TARGET, (16, 8, 4, 2)) == np.inf
    with pytest.raises(QvlaError, match="the method must be one of"):
        allocate_bits(table, Budget("bits per channel", 4), TARGET, method="lp")  # type: ignore[arg-type]


def test_many_channels_are_allocated_within_a_hundredth_of_a_percent() -> None:
    table = random_sensitivities(4, (20_000, 20_000, 20_000))
    budget = Budget("bits per channel", 3.0)
    plan = allocate_bits(table, budget, TARGET, method="hull")
    assert plan.expected_error is not None
    assert plan.expected_error / least_error(table, budget, TARGET) - 1 < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("method", ["algorithm1", "hull"])
def test_a_7b_decoder_is_allocated_within_a_gigabyte(method: str) -> None:
    """1.36 million channels at five widths."""
    shapes = llama_layers(TransformerSize(4096, 11008, 32))
    table = random_sensitivities(5, tuple(channels for channels, _ in shapes.values()))
    budget = Budget("bits per channel", 4.0)
    tracemalloc.start()
    try:
        plan = allocate_bits(table, budget, TARGET, method=method)  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1e9
    assert plan.expected_error is not None
    gap = plan.expected_error / least_error(table, budget, TARGET) - 1
    assert 0 <= gap + 1e-9 < (1e-4 if method == "hull" else 0.01)
