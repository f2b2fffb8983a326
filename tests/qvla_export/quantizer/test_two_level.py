"""Scales of two levels: every code expands to int8, and packed, expanded and stored agree."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scale_forms import check_buckets_on_ort, check_compensated_bundle, check_run

from engines.targets import CPU, find_target
from qvla_export.graph.buckets import bucket_weight
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.compensation import round_layer
from qvla_export.quantizer.moments import LayerMoments
from qvla_export.quantizer.packed_storage import bucket_bytes
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import (
    QuantizerSpec,
    WidthRule,
    at_steps,
    channel_steps,
    compensated_spec,
    quantize_channels,
    spec_for,
    with_steps,
)
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.quantizer.rounding import RoundedLayer, Rounding
from qvla_export.quantizer.two_level_scales import LARGEST_MULTIPLIER
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import UnsupportedOnTarget

Observations = Callable[..., list[Observation]]
LEVELED = CPU.with_two_level_scales()
# Rows of ordinary size, of zeros, of values beyond float16, with ties and outliers.
WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 150)),
    elements=st.one_of(
        st.floats(-2, 2, width=32),
        st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.25, 30.0, -3e5, 1e-7]),
    ),
)


def spec(group: int = 64) -> QuantizerSpec:
    return QuantizerSpec({b: WidthRule(group, "mse", 16, two_level=True) for b in (2, 4)})


def expanded(weight: QuantizedWeight) -> NDArray[np.int64]:
    """Codes times multipliers, in wide integers."""
    assert weight.multipliers is not None and weight.group_size is not None
    factors = np.repeat(weight.multipliers.astype(np.int64), weight.group_size, axis=1)
    return weight.codes.astype(np.int64) * factors[:, : weight.codes.shape[1]]


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from([2, 4]), st.sampled_from([1, 7, 64, 128]), st.data())
def test_every_code_expands_to_the_same_int8_weight(
    weight: NDArray[np.float32], bits: int, group: int, data: st.DataObject
) -> None:
    inputs = weight.shape[1]
    moment = data.draw(hnp.arrays(np.float32, inputs, elements=st.floats(0, 4, width=32)))
    made = quantize_channels(weight, bits, spec(group), moment)
    assert made.multipliers is not None and made.multipliers.dtype == np.uint8
    assert 1 <= made.multipliers.min() <= made.multipliers.max() <= LARGEST_MULTIPLIER[bits]
    wide = expanded(made)
    assert wide.min() >= -128 and wide.max() <= 127
    np.testing.assert_array_equal(made.expanded(), wide)
    # Integers times a float16: exact in float64, and what an engine computes with in float32.
    exact = wide * made.scales.astype(np.float64)
    np.testing.assert_array_equal(made.dequantize(), exact.astype(np.float32))
    np.testing.assert_array_equal(made.dequantize(), exact)
    assert made.nbytes == bucket_bytes(
        len(weight), inputs, replace(LEVELED.containers[bits], group_size=group)
    ) - _filled_bytes(made)


def _filled_bytes(made: QuantizedWeight) -> int:
    """Bytes of the channels that fill 2-bit columns up to fours, and of the last byte's rest."""
    (channels, inputs), bits = made.codes.shape, made.bits
    assert made.multipliers is not None
    missing = -channels % 4 if bits == 2 else 0
    codes = -(-(channels + missing) * inputs * bits // 8) - -(-channels * inputs * bits // 8)
    return codes + missing * (made.multipliers.shape[1] + 2)


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from([2, 4]), st.sampled_from([7, 64]))
def test_rounded_weights_become_the_same_codes_again(
    weight: NDArray[np.float32], bits: int, group: int
) -> None:
    how = spec(group)
    steps = channel_steps(weight, bits, how)
    made = at_steps(weight, bits, how, steps)
    again = at_steps(made.dequantize(), bits, how, steps)
    np.testing.assert_array_equal(again.codes, made.codes)
    assert again.multipliers is not None and made.multipliers is not None
    np.testing.assert_array_equal(again.multipliers, made.multipliers)
    np.testing.assert_array_equal(again.scales, made.scales)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tails", [False, True])
def test_error_is_that_of_free_scales_within_two_percent(bits: int, tails: bool) -> None:
    generator = np.random.default_rng(bits)
    drawn = generator.standard_t(4, (32, 512)) if tails else generator.standard_normal((32, 512))
    weight, moment = drawn.astype(np.float32) * 0.02, generator.random(512, np.float32)

    def error(how: QuantizerSpec) -> float:
        missed = quantize_channels(weight, bits, how, moment).dequantize() - weight
        return float(np.sqrt((np.square(missed) * moment).sum()))

    free = QuantizerSpec({bits: WidthRule(64, "mse", 16)})
    assert error(spec()) <= 1.02 * error(free)


def test_artifacts_of_one_level_are_as_before(tmp_path: Path) -> None:
    plain, leveled = spec_for(CPU), spec_for(LEVELED)
    assert all("two_level" not in rule for rule in plain.to_json().values())
    assert leveled.to_json()["4"]["two_level"] is True and "two_level" not in leveled.to_json()["8"]
    for how in (plain, leveled):
        assert QuantizerSpec.from_json(how.to_json()) == how
    shapes, plans = {"a": (8, 200)}, []
    for target in (CPU, LEVELED):
        plans.append(uniform_plan(shapes, 4, target, "d" * 64))
        plans[-1].save(tmp_path / "plan.json")
        assert BitPlan.load(tmp_path / "plan.json").digest == plans[-1].digest
        assert ("two_level" in (tmp_path / "plan.json").read_text()) is (target is LEVELED)
    # 8 channels of 4 groups: 4 float16 scales, or one and 4 bytes.
    assert plans[0].weight_bytes - plans[1].weight_bytes == 8 * (4 * 2 - (2 + 4))
    made = quantize_channels(np.ones((8, 200), np.float32), 4, leveled)
    assert made.nbytes == plans[1].weight_bytes
    assert 8 * made.nbytes == 8 * LEVELED.containers[4].row_bits(200)


def test_a_target_that_has_none_refuses_with_the_reason() -> None:
    with pytest.raises(UnsupportedOnTarget, match="has no two-level scales"):
        find_target("cuda", scales="two-level")
    assert find_target("cpu", scales="two-level") == LEVELED
    with pytest.raises(QvlaError, match="--zero-points go with a scale for every group"):
        find_target("cpu", zero_points=True, scales="two-level")


def test_rules_that_have_no_two_levels_are_refused() -> None:
    for rule in (WidthRule(64, "max", 16), WidthRule(64, "mse", 32), WidthRule(None, "mse", 16)):
        with pytest.raises(QvlaError, match="scales of two levels are of groups"):
            replace(rule, two_level=True)
    with pytest.raises(QvlaError, match=r"two levels are for \[2, 4\] bits, got \[8\]"):
        QuantizerSpec({8: WidthRule(64, "mse", 16, two_level=True)})
    with pytest.raises(QvlaError, match="makes two levels of scales"):
        uniform_plan({"a": (8, 100)}, 4, CPU, "d" * 64, spec_for(LEVELED))
    codes, halves = np.zeros((2, 3), np.int8), np.zeros((0, 3), np.float16)
    for factors in (np.ones((2, 9), np.uint8), np.zeros((2, 1), np.uint8)):
        with pytest.raises(QvlaError, match="do not go with"):
            RoundedLayer(codes, halves, np.ones((2, 1), np.float32), None, factors)
    with pytest.raises(QvlaError, match="are no integers of one scale"):
        quantize_channels(np.ones((1, 100), np.float32), 4, spec_for(CPU)).expanded()


@pytest.mark.parametrize("channels", [1, 5, 30])
@pytest.mark.parametrize("inputs", [20, 64, 150])
def test_packed_buckets_on_ort_compute_with_two_levels(
    channels: int, inputs: int, tmp_path: Path
) -> None:
    check_buckets_on_ort(LEVELED, 0.0, channels, inputs, tmp_path)


def random_moments(inputs: int, channels: int) -> LayerMoments:
    """Moments of inputs and channels that depend on each other."""
    generator = np.random.default_rng(5)
    squares = []
    for size in (inputs, channels):
        rows = generator.standard_normal((2 * size, size)).astype(np.float32)
        squares.append((rows.T @ rows / size)[None])
    return LayerMoments(np.zeros(inputs, np.float32), *squares)


def test_compensated_codes_have_two_levels_and_come_back(tmp_path: Path) -> None:
    generator = np.random.default_rng(6)
    weight = generator.standard_normal((24, 150)).astype(np.float32)
    widths = np.repeat([16, 8, 4, 2, 0], [2, 6, 8, 6, 2]).astype(np.int8)
    how, moments = compensated_spec(LEVELED), random_moments(150, 24)
    # Inputs in another order and fewer of them, as an MLP's consumer has them.
    order = generator.permutation(150)[:140]
    layer = round_layer(weight, widths, how, moments, order)
    assert layer.multipliers is not None
    for bits in (2, 4):
        chosen, groups = widths == bits, 3
        factors = layer.multipliers[chosen]
        assert 1 < factors.max() <= LARGEST_MULTIPLIER[bits]
        made = with_steps(layer.codes[chosen][:, order], bits, how, layer.steps.of(chosen, groups))
        exact = made.expanded() * made.scales.astype(np.float64)
        np.testing.assert_array_equal(layer.rows(widths, how, order)[chosen][:, order], exact)
    assert (layer.multipliers[np.isin(widths, [0, 8, 16])] == 1).all()
    # What is packed are these codes.
    rows = layer.rows(widths, how, order)[:, order]
    stored = bucket_weight(rows, widths, how, layer.steps)
    for part in stored.weights:
        if part.bits != 16:
            np.testing.assert_array_equal(part.codes, layer.codes[widths == part.bits][:, order])
    rounding = Rounding({"a": layer}, "p" * 64, "m" * 64)
    rounding.save(tmp_path / "rounding")
    assert Rounding.load(tmp_path / "rounding").digest == rounding.digest


@pytest.mark.slow
def test_compensated_codes_with_two_levels_are_packed(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    observations = [*tiny_observations(6), *tiny_observations(8, seed=8)]
    plan = check_compensated_bundle(LEVELED, tiny_policy, observations, tmp_path)
    assert plan.rounding is not None
    factors = [layer.multipliers for layer in plan.rounding.layers.values()]
    assert any(found is not None and (found > 1).any() for found in factors)


def test_a_run_measures_plans_and_expands_two_levels(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    plan = check_run(LEVELED, tiny_policy, tiny_observations(12), tmp_path)
    assert plan.histogram()[16] == 0
