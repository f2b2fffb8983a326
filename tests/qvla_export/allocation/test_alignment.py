"""Buckets of whole multiples of channels: what is promoted, what never happens, what it costs."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_latency_models import SMALL, model_of, small_sensitivities

from engines.bench.kernel_rates import ORIN_RATES
from engines.targets import CPU, ORIN_JP7, RTX4070
from qvla_export.allocation.alignment import align_plan, align_within
from qvla_export.allocation.allocate import Budget, LatencyLimit, allocate_bits
from qvla_export.quantizer.packed_storage import stored_layers
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError

WIDTHS = (0, 2, 4, 8)
# Layer -> channels, weights of a channel: attention, a gated and a plain MLP, one alone.
SHAPES = {
    "a.q_proj": (24, 48),
    "a.k_proj": (8, 48),
    "a.v_proj": (16, 48),
    "a.o_proj": (48, 24),
    "g.gate_proj": (40, 48),
    "g.up_proj": (40, 48),
    "g.down_proj": (48, 40),
    "m.fc1": (32, 48),
    "m.fc2": (48, 32),
    "odd": (21, 48),
}
MERGED = {
    "a.q_proj": ("a.q_proj", "a.k_proj", "a.v_proj"),
    "g.gate_proj": ("g.gate_proj", "g.up_proj"),
}
TARGET = replace(RTX4070, channel_multiple=8)


def table(seed: int) -> Sensitivities:
    generator = np.random.default_rng(seed)
    values = {
        name: -np.sort(-generator.exponential(1, (len(WIDTHS), n)), axis=0).astype(np.float32)
        for name, (n, _) in SHAPES.items()
    }
    return Sensitivities(
        values=values,
        widths=WIDTHS,
        weights_per_channel={name: k for name, (_, k) in SHAPES.items()},
        method="exact",
        samples=1,
        probes=0,
        policy_digest="p" * 64,
        calibration_digest="c" * 64,
        quantizer=spec_for(TARGET),
    )


def random_plan(seed: int, shares: list[float]) -> BitPlan:
    generator = np.random.default_rng(seed)
    chances = np.array(shares) / sum(shares)
    plan = uniform_plan(SHAPES, 4, TARGET, "p" * 64)
    widths = {
        name: generator.choice([0, 2, 4, 8, 16], n, p=chances).astype(np.int8)
        for name, (n, _) in SHAPES.items()
    }
    return replace(plan, widths=widths)


def kept_units(plan: BitPlan) -> dict[str, NDArray[np.bool_]]:
    """Hidden units that no producer prunes."""
    return {
        name: np.min([plan.widths[n] for n in coupling.producers], axis=0) > 0
        for coupling in plan.couplings.values()
        for name in coupling.producers
    }


plans = st.builds(
    random_plan,
    st.integers(0, 999),
    st.lists(st.floats(0.02, 1.0), min_size=5, max_size=5),
)


@settings(max_examples=25, deadline=None)
@given(plan=plans, seed=st.integers(0, 99))
def test_buckets_are_whole_and_no_channel_gets_worse(plan: BitPlan, seed: int) -> None:
    aligned = align_plan(plan, table(seed), TARGET)
    units = kept_units(plan)
    for name, widths in aligned.widths.items():
        judged = units.get(name, np.ones(len(widths), bool))
        assert (widths[judged] >= plan.widths[name][judged]).all()
        members = MERGED.get(name, (name,))
        if name == "odd" or any(name in others[1:] for others in MERGED.values()):
            continue
        joined = np.concatenate([aligned.widths[member] for member in members])
        for bits in set(joined.tolist()) - {0}:
            assert (joined == bits).sum() % TARGET.channel_multiple == 0
    odd = aligned.widths["odd"]
    for bits in sorted(set(odd.tolist()) - {0})[1:]:
        assert (odd == bits).sum() % TARGET.channel_multiple == 0


@settings(max_examples=25, deadline=None)
@given(plan=plans, seed=st.integers(0, 99))
def test_graph_has_the_same_whole_buckets(plan: BitPlan, seed: int) -> None:
    """Units that fill a consumer's groups up come in multiples too."""
    aligned = align_plan(plan, table(seed), TARGET)
    layers = stored_layers(aligned.widths, aligned.weights_per_channel, aligned.containers)
    for layer in layers:
        for bits in set(layer.widths.tolist()) - {0}:
            if layer.names != ("odd",):
                assert (layer.widths == bits).sum() % TARGET.channel_multiple == 0


@settings(max_examples=25, deadline=None)
@given(plan=plans, seed=st.integers(0, 99))
def test_aligned_twice_is_aligned_once(plan: BitPlan, seed: int) -> None:
    once = align_plan(plan, table(seed), TARGET)
    twice = align_plan(once, table(seed), TARGET)
    assert all(np.array_equal(once.widths[n], twice.widths[n]) for n in once.widths)


def test_channels_that_gain_most_are_promoted() -> None:
    plan = uniform_plan(SHAPES, 4, TARGET, "p" * 64)
    widths = dict(plan.widths)
    widths["a.o_proj"] = np.array([8] * 5 + [4] * 43, np.int8)
    measured = table(3)
    gain = measured.at("a.o_proj", 4) - measured.at("a.o_proj", 8)
    expected = widths["a.o_proj"].copy()
    expected[5 + np.argsort(-gain[5:])[:3]] = 8
    aligned = align_plan(replace(plan, widths=widths), measured, TARGET)
    assert np.array_equal(aligned.widths["a.o_proj"], expected)


def test_multiple_of_one_changes_nothing() -> None:
    plan = replace(random_plan(0, [1] * 5), target=CPU.name)
    assert align_plan(plan, table(0), CPU) is plan


@pytest.mark.parametrize("mean_bits", [3.0, 4.0, 6.0])
def test_budget_holds_after_alignment(mean_bits: float) -> None:
    measured = table(1)

    def allocate(share: float, limit: LatencyLimit | None) -> BitPlan:
        assert limit is None
        return allocate_bits(measured, Budget("bits per channel", share * mean_bits), TARGET)

    plain = allocate(1.0, None)
    aligned = align_within(allocate, measured, TARGET)
    assert aligned.budget == plain.budget == f"{mean_bits:g} mean bits per channel"
    assert 0.8 * plain.weight_bytes <= aligned.weight_bytes <= plain.weight_bytes
    assert aligned.mean_bits_per_channel <= plain.mean_bits_per_channel <= mean_bits
    again = align_within(allocate, measured, TARGET)
    assert again.digest == aligned.digest


def test_budget_that_cannot_be_aligned_is_refused() -> None:
    plan = random_plan(0, [1, 0.02, 1, 1, 0.02])
    with pytest.raises(QvlaError, match="whole 8 channels"):
        align_within(lambda share, limit: plan, table(0), TARGET)


def test_nothing_kept_is_aligned() -> None:
    nothing = random_plan(0, [1] * 5)
    nothing = replace(nothing, widths={n: np.zeros_like(w) for n, w in nothing.widths.items()})
    aligned = align_within(lambda share, limit: nothing, table(0), TARGET)
    assert all((widths == 0).all() for widths in aligned.widths.values())
    # The plain MLP's constant units are a float32 bias of its consumer; nothing else is stored.
    assert aligned.weight_bytes == 4 * SHAPES["m.fc2"][0]


@pytest.mark.parametrize("share_of_free", [0.95, 0.9, 0.8])
@pytest.mark.parametrize("method", ["algorithm1", "hull"])
def test_latency_limit_holds_after_alignment(share_of_free: float, method: Any) -> None:
    """Without tiles and launches every channel that alignment adds is predicted to take time."""
    rates = replace(ORIN_RATES, channel_tile=1, launch_us=0.0)
    model = model_of(SMALL.network, rates)
    measured, budget = small_sensitivities(), Budget("bits per channel", 8.0)

    def allocate(share: float, limit: LatencyLimit | None) -> BitPlan:
        part = replace(budget, value=share * budget.value)
        return allocate_bits(measured, part, ORIN_JP7, latency=limit, method=method)

    free = allocate(1.0, None)
    max_ms = share_of_free * model.predict(free.widths).total_ms
    limit = LatencyLimit(max_ms, model)
    unchecked = align_plan(allocate(1.0, limit), measured, ORIN_JP7)
    aligned = align_within(allocate, measured, ORIN_JP7, limit)
    assert (
        model.predict(aligned.widths).total_ms <= max_ms < model.predict(unchecked.widths).total_ms
    )
    assert aligned.weight_bytes <= free.weight_bytes
    assert aligned.budget == f"{budget}, {limit}"
