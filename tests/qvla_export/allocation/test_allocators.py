"""What every way to choose widths keeps: budgets, allowed widths, caps; and what each is alone."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_plans import (
    MODULES,
    TARGET,
    modules_table,
    random_sensitivities,
    sensitivities,
    tables,
    widths_of,
)

from qvla_export.allocation.allocate import (
    METHODS,
    Budget,
    PruningRule,
    allocate_bits,
    find_allocator,
    least_error,
)
from qvla_export.allocation.gates import GATES
from qvla_export.quantizer.plan import BitPlan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WIDTHS

methods = st.sampled_from(METHODS)
kinds = st.sampled_from(["bits per channel", "bits per weight", "bytes"])
width_sets = st.sampled_from(
    [WIDTHS, (2, 4, 8, 16), (0, 8), (8,), (0, 4), (16, 2), (0, 2, 4), (0, 2, 8)]
)


def spent(plan: BitPlan, kind: str) -> float:
    return {
        "bits per channel": plan.mean_bits_per_channel,
        "bits per weight": plan.mean_bits_per_weight,
        "bytes": float(plan.weight_bytes),
    }[kind]


def least_spent(table: Sensitivities, kind: str, lowest: int) -> float:
    """What the plan of the lowest width costs."""
    widths = {n: np.full(v.shape[1], lowest, np.int8) for n, v in table.values.items()}
    plan = allocate_bits(table, Budget("bits per channel", 16.0), TARGET)
    return spent(replace(plan, widths=widths, allocation=None), kind)


@given(tables(), methods, kinds, width_sets, st.floats(0, 1.1))
def test_budgets_hold_and_only_allowed_widths_occur(
    table: Sensitivities, method: str, kind: str, widths: tuple[int, ...], share: float
) -> None:
    """Any table: the plan is within the budget, or the lowest allowed width is not either."""
    value = share * least_spent(table, kind, 16)
    budget = Budget(kind, value)  # type: ignore[arg-type]  # a Literal
    allocator = find_allocator(method)
    try:
        plan = allocate_bits(table, budget, TARGET, widths, method=allocator)
    except QvlaError as error:
        assert "cannot be met" in str(error)
        # Gates have a share of 0 bits; everything can go there.
        assert value < least_spent(table, kind, min(widths)) + 1e-6
        return
    assert spent(plan, kind) <= value * (1 + 1e-9) + 1e-9
    assert set(widths_of(plan).tolist()) <= set(widths)


@given(tables(), kinds, width_sets, st.floats(0.1, 1))
def test_the_hull_is_within_its_bound_and_one_step(
    table: Sensitivities, kind: str, widths: tuple[int, ...], share: float
) -> None:
    budget = Budget(kind, share * least_spent(table, kind, 16))  # type: ignore[arg-type]  # Literal
    least = least_error(table, budget, TARGET, widths)
    for method in METHODS:
        try:
            plan = allocate_bits(table, budget, TARGET, widths, method=method)
        except QvlaError:
            continue
        assert plan.expected_error is not None
        # No method goes below; the hull's last step is all that separates it.
        assert plan.expected_error >= least * (1 - 1e-9) - 1e-9
        if method == "hull" and kind != "bytes":
            largest = max(float(values.max()) for values in table.values.values())
            assert plan.expected_error <= least + largest + 1e-6


@pytest.mark.parametrize("kind", ["bits per channel", "bits per weight", "bytes"])
@pytest.mark.parametrize("seed", range(4))
def test_the_hull_is_never_worse_than_other_methods(kind: str, seed: int) -> None:
    table = modules_table(seed, 400)
    for share in (0.06, 0.125, 0.18, 0.25, 0.5):
        value = share * least_spent(table, kind, 16)
        budget = Budget(kind, value)  # type: ignore[arg-type]  # a Literal
        found = {m: allocate_bits(table, budget, TARGET, method=m) for m in METHODS}
        errors = {m: plan.expected_error or 0.0 for m, plan in found.items()}
        # Never worse than Algorithm 1 but for the last step, which may leave some budget unused.
        assert errors["hull"] <= errors["algorithm1"] * 1.005
        assert errors["hull"] < min(errors[m] for m in METHODS if m not in ("hull", "algorithm1"))
        assert errors["algorithm1"] <= errors["per-layer"] <= errors["per-module"] * (1 + 1e-9)
        assert errors["per-module"] <= errors["uniform"] * (1 + 1e-9)


@given(
    tables(), st.sampled_from(["hull", "algorithm1", "staged"]), st.floats(0, 16), st.floats(0, 16)
)
def test_a_lower_budget_raises_no_channel(
    table: Sensitivities, method: str, one: float, other: float
) -> None:
    allocator = find_allocator(method)
    low, high = (
        widths_of(allocate_bits(table, Budget("bits per channel", b), TARGET, method=allocator))
        for b in sorted((one, other))
    )
    assert (low <= high).all()


@given(tables(), st.sampled_from(["uniform", "per-module"]), st.floats(0, 16), st.floats(0, 16))
def test_a_lower_budget_of_whole_modules_never_has_less_error(
    table: Sensitivities, method: str, one: float, other: float
) -> None:
    allocator = find_allocator(method)
    low, high = (
        allocate_bits(table, Budget("bits per channel", b), TARGET, method=allocator)
        for b in sorted((one, other))
    )
    assert low.expected_error is not None and high.expected_error is not None
    assert low.expected_error >= high.expected_error * (1 - 1e-9) - 1e-9


@pytest.mark.parametrize("method", METHODS)
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
def test_pruning_rules_hold(method: str, rule: PruningRule) -> None:
    table = modules_table(3)
    allocator = find_allocator(method)
    # Whole layers are hardly ever pruned under a rule.
    budget = Budget("bits per channel", 1.9 if allocator.grain == "channel" else 2.4)
    plan = allocate_bits(table, budget, TARGET, pruning=rule, method=allocator)
    pruned = {name: widths == 0 for name, widths in plan.widths.items()}
    if allocator.grain == "channel":
        assert any(where.any() for where in pruned.values())
    channels = len(widths_of(plan))
    assert sum(where.sum() for where in pruned.values()) <= rule.max_share * channels
    for name, where in pruned.items():
        at_zero = table.at(name, 0)
        assert where.mean() <= rule.max_share_of_layer
        if rule.absolute_threshold is not None:
            assert (at_zero[where] <= rule.absolute_threshold).all()
        if rule.relative_threshold is not None:
            assert (at_zero[where] <= rule.relative_threshold * at_zero.mean()).all()
    assert plan.allocation is not None
    assert plan.allocation["pruning"] == rule.to_json()


def test_whole_layers_are_pruned_within_the_share_of_all() -> None:
    """Layers of no sensitivity at all: as many as the cap allows lose all their channels."""
    table = sensitivities({f"layer.{i}": np.zeros((4, 10), np.float32) for i in range(10)})
    plan = allocate_bits(
        table,
        Budget("bits per channel", 1.5),
        TARGET,
        pruning=PruningRule(max_share=0.35),
        method="per-layer",
    )
    kept = [bool(widths.any()) for widths in plan.widths.values()]
    assert kept.count(False) == 3
    assert all(len(set(widths.tolist())) == 1 for widths in plan.widths.values())


@given(tables(), kinds, st.floats(0.05, 1))
def test_layers_get_one_width_and_so_does_the_policy(
    table: Sensitivities, kind: str, share: float
) -> None:
    budget = Budget(kind, share * least_spent(table, kind, 16))  # type: ignore[arg-type]  # Literal
    plan = allocate_bits(table, budget, TARGET, method="per-layer")
    assert all(len(set(widths.tolist())) == 1 for widths in plan.widths.values())
    plan = allocate_bits(table, budget, TARGET, method="uniform")
    assert len(set(widths_of(plan).tolist())) == 1


def test_modules_get_one_width_each_and_the_best_of_all_combinations() -> None:
    table, budget = modules_table(1), Budget("bits per channel", 4.0)
    plan = allocate_bits(table, budget, TARGET, method="per-module")
    vision, fused, language = MODULES[:2], MODULES[2:3], MODULES[3:]
    best = np.inf
    for a in WIDTHS:
        for b in WIDTHS:
            for c in WIDTHS:
                chosen = {**dict.fromkeys(vision, a), **dict.fromkeys(fused, b)}
                chosen |= dict.fromkeys(language, c)
                bits = sum(chosen[n] * table.values[n].shape[1] for n in MODULES)
                if bits <= 4.0 * sum(v.shape[1] for v in table.values.values()):
                    error = sum(float(table.at(n, chosen[n]).sum(dtype=float)) for n in MODULES)
                    best = min(best, error)
    assert plan.expected_error == pytest.approx(best, rel=1e-6)
    for group in (vision, fused, language):
        assert len({int(bits) for name in group for bits in plan.widths[name]}) == 1


def test_layers_leave_less_than_any_promotion_of_one_unused() -> None:
    table, budget = modules_table(2), Budget("bits per channel", 4.0)
    plan = allocate_bits(table, budget, TARGET, method="per-layer")
    channels = len(widths_of(plan))
    unused = 4.0 * channels - plan.mean_bits_per_channel * channels
    for name, widths in plan.widths.items():
        for bits in WIDTHS:
            if bits > widths[0] and table.at(name, bits).sum() < table.at(name, widths[0]).sum():
                assert (bits - int(widths[0])) * len(widths) > unused


def staged_text(table: Sensitivities, mean_bits: float) -> NDArray[np.int64]:
    """Section 3.3.2, word by word; ties go to the lower channel."""
    error = {
        bits: np.concatenate([table.at(name, bits) for name in table.values]).astype(float)
        for bits in WIDTHS
    }
    bits_of = np.full(len(error[16]), 16)
    for high, low in ((16, 8), (8, 4), (4, 2), (2, 0)):
        rho = (error[low] - error[high]) / (high - low)
        for channel in np.argsort(rho, kind="stable"):
            if bits_of.sum() <= mean_bits * len(bits_of) + 1e-6:
                return bits_of
            bits_of[channel] = low
    return bits_of


@given(tables(), st.floats(0, 16))
def test_the_staged_variant_is_the_text(table: Sensitivities, mean_bits: float) -> None:
    plan = allocate_bits(table, Budget("bits per channel", mean_bits), TARGET, method="staged")
    assert widths_of(plan).tolist() == staged_text(table, mean_bits).tolist()


@pytest.mark.parametrize("row", range(len(GATES)))
def test_gates_are_the_shares_of_table_6(row: int) -> None:
    """As printed where the budget allows it, tilted to it where not."""
    table, gates = random_sensitivities(0, (400, 600)), GATES[row]
    mean = sum(bits * share for bits, share in gates.items())
    for budget in (mean, 9.0):
        plan = allocate_bits(
            table,
            Budget("bits per channel", budget),
            TARGET,
            method=find_allocator("gates", gates),
        )
        assert plan.histogram() == {bits: round(1000 * gates[bits]) for bits in WIDTHS}
    tilted = allocate_bits(
        table, Budget("bits per channel", 4.0), TARGET, method=find_allocator("gates", gates)
    )
    assert 3.9 < tilted.mean_bits_per_channel <= 4.0
    ratio = [tilted.histogram()[b] / gates[b] for b in WIDTHS]
    assert ratio == sorted(ratio, reverse=True)
    assert tilted.allocation is not None
    assert tilted.allocation["gates"] == {str(b): share for b, share in sorted(gates.items())}


def test_gates_keep_the_most_sensitive_channels_widest() -> None:
    table = random_sensitivities(5, (300,))
    plan = allocate_bits(table, Budget("bits per channel", 9.0), TARGET, method="gates")
    rho = (table.at("layer.0", 8) - table.at("layer.0", 16)) / 8
    widest = plan.widths["layer.0"] == 16
    assert widest.sum() == 48
    assert rho[widest].min() >= rho[~widest].max()


def test_the_share_of_a_width_that_is_not_allowed_goes_to_the_next_wider() -> None:
    table = random_sensitivities(6, (100,))
    allocator = find_allocator("gates", {2: 0.5, 8: 0.5})
    plan = allocate_bits(table, Budget("bits per channel", 16), TARGET, (4, 8), method=allocator)
    assert plan.histogram() == {0: 0, 2: 0, 4: 50, 8: 50, 16: 0}


@pytest.mark.parametrize("method", METHODS)
def test_plans_record_how_they_were_made(method: str, tmp_path: Path) -> None:
    plan = allocate_bits(
        modules_table(),
        Budget("bits per channel", 5.0, max_stored_ratio=0.4),
        TARGET,
        widths=(2, 4, 8, 16),
        method=find_allocator(method),
    )
    path = tmp_path / "plan.json"
    plan.save(path)
    loaded = BitPlan.load(path)
    assert loaded.allocation is not None
    assert loaded.allocation["method"] == method
    assert loaded.allocation["widths"] == [2, 4, 8, 16]
    assert loaded.allocation["budget"] == {
        "kind": "bits per channel",
        "value": 5.0,
        "max_stored_ratio": 0.4,
        "rounded_inputs": False,
    }
    assert loaded.digest == plan.digest
    # Plans of before methods were recorded keep their digest.
    value = json.loads(path.read_text())
    del value["allocation"]
    path.write_text(json.dumps(value))
    assert BitPlan.load(path).digest == replace(plan, allocation=None).digest != plan.digest


def test_what_is_no_method_or_rule_is_refused() -> None:
    with pytest.raises(QvlaError, match=r"the method must be one of.*hull.*got 'lp'"):
        find_allocator("lp")
    with pytest.raises(QvlaError, match="gates are for the method 'gates'"):
        find_allocator("hull", {8: 1.0})
    for wrong in ({3: 1.0}, {8: 0.5}, {8: 1.5, 4: -0.5}, {}, {8: float("nan")}):
        with pytest.raises(QvlaError, match="add up to 1"):
            find_allocator("gates", wrong)
    with pytest.raises(QvlaError, match=r"max_share_of_layer.*share from 0 to 1.*1.5"):
        PruningRule(max_share_of_layer=1.5)
    with pytest.raises(QvlaError, match=r"relative_threshold.*>= 0.*-1"):
        PruningRule(relative_threshold=-1)
    with pytest.raises(QvlaError, match=r"none of the allowed.*\[2\].*allow one"):
        eight = replace(TARGET, containers={8: TARGET.containers[8]})
        allocate_bits(random_sensitivities(0), Budget("bits per channel", 8), eight, (2,))


@pytest.mark.parametrize("method", METHODS)
def test_budgets_below_everything_say_what_is_reachable(method: str) -> None:
    budget = Budget("bits per channel", 1.0)
    with pytest.raises(QvlaError, match=r"cannot be met.*allowed.*least.*raise the budget"):
        allocate_bits(
            random_sensitivities(7), budget, TARGET, (2, 4, 8, 16), method=find_allocator(method)
        )
