"""Zero points: never worse than symmetric codes, and the same numbers and bytes everywhere."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scale_forms import check_buckets_on_ort, check_compensated_bundle, check_run
from tiny_bundles import mixed_plan

from engines.targets import CPU, find_target
from qvla_export.pipeline.quantizers import variants
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import (
    CODE_RANGE,
    QuantizerSpec,
    ScaleRule,
    WidthRule,
    at_steps,
    channel_steps,
    quantize_channels,
    spec_for,
)
from qvla_export.quantizer.rounding import RoundedLayer
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import UnsupportedOnTarget

Observations = Callable[..., list[Observation]]
POINTED = CPU.with_zero_points()

# Rows of ordinary size, of one or both signs, with ties, repeated values and outliers.
WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    elements=st.one_of(
        st.floats(-2, 2, width=32),
        st.floats(0, 2, width=32),
        st.sampled_from([0.0, 1.0, -1.0, 0.5, -0.25, 30.0, -30.0]),
    ),
)
GROUPS = st.sampled_from([None, 1, 7, 16])


def spec(
    zero_points: bool, rule: ScaleRule = "mse", group: int | None = None, scale_bits: int = 32
) -> QuantizerSpec:
    return QuantizerSpec({b: WidthRule(group, rule, scale_bits, zero_points) for b in CODE_RANGE})


def squared(
    weight: NDArray[np.float32],
    bits: int,
    how: QuantizerSpec,
    moment: NDArray[np.float32] | None = None,
) -> float:
    error = quantize_channels(weight, bits, how, moment).dequantize().astype(np.float64) - weight
    return float((np.square(error) * (1.0 if moment is None else moment)).sum())


def slack(
    error: float, weight: NDArray[np.float32], moment: NDArray[np.float32] | None = None
) -> float:
    """What errors may differ by for being searched in float32."""
    whole = np.square(weight.astype(np.float64)) * (1.0 if moment is None else moment)
    return 1e-4 * error + 1e-7 * float(whole.sum()) + 1e-12


@settings(deadline=None)
@given(
    WEIGHTS, GROUPS, st.sampled_from(sorted(CODE_RANGE)), st.sampled_from(["max", "mse"]), st.data()
)
def test_never_worse_than_symmetric(
    weight: NDArray[np.float32], group: int | None, bits: int, rule: ScaleRule, data: st.DataObject
) -> None:
    moment = None
    if rule == "mse":
        inputs = weight.shape[1]
        moment = data.draw(hnp.arrays(np.float32, inputs, elements=st.floats(0, 4, width=32)))
    symmetric = squared(weight, bits, spec(False, rule, group), moment)
    pointed = squared(weight, bits, spec(True, rule, group), moment)
    assert pointed <= symmetric + slack(symmetric, weight, moment)


@settings(deadline=None)
@given(WEIGHTS, GROUPS)
def test_more_bits_never_mean_more_error(weight: NDArray[np.float32], group: int | None) -> None:
    sums = [squared(weight, bits, spec(True, "mse", group)) for bits in (0, 2, 4, 8)]
    assert all(more <= less + slack(less, weight) for less, more in pairwise(sums)), sums


@settings(deadline=None)
@given(WEIGHTS, GROUPS, st.sampled_from(sorted(CODE_RANGE)), st.sampled_from(["max", "mse"]))
def test_codes_and_zero_points_stay_in_range_and_come_back(
    weight: NDArray[np.float32], group: int | None, bits: int, rule: ScaleRule
) -> None:
    how, (low, high) = spec(True, rule, group), CODE_RANGE[bits]
    steps = channel_steps(weight, bits, how)
    made = at_steps(weight, bits, how, steps)
    assert made.zero_points is not None and made.zero_points.dtype == np.int8
    assert made.zero_points.shape == made.scales.shape
    for values in (made.codes, made.zero_points):
        assert values.min() >= low and values.max() <= high
    assert np.isfinite(made.dequantize()).all()
    np.testing.assert_array_equal(at_steps(made.dequantize(), bits, how, steps).codes, made.codes)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_one_sign_use_all_codes(bits: int) -> None:
    low, high = CODE_RANGE[bits]
    levels = np.arange(high - low + 1, dtype=np.float32)
    for weight in (levels[None], -levels[None]):
        symmetric = squared(weight / levels[-1], bits, spec(False))
        assert squared(weight / levels[-1], bits, spec(True)) < 0.05 * symmetric


def test_equal_errors_keep_a_zero_point_of_zero() -> None:
    levels = np.array([[-1, 0, 1, 1, 0, -1]], np.float32)
    for bits in (2, 4, 8):
        for rule in ("max", "mse"):
            made = quantize_channels(levels * 0.3, bits, spec(True, rule))
            assert made.zero_points is not None and not made.zero_points.any()


def test_artifacts_without_zero_points_are_as_before(tmp_path: Path) -> None:
    plain, pointed = spec_for(CPU), spec_for(POINTED)
    assert all("zero_points" not in rule for rule in plain.to_json().values())
    assert pointed.to_json()["4"]["zero_points"] is True
    for how in (plain, pointed):
        assert QuantizerSpec.from_json(how.to_json()) == how
    shapes = {"a": (8, 100)}
    for target in (CPU, POINTED):
        plan = uniform_plan(shapes, 4, target, "d" * 64)
        plan.save(tmp_path / "plan.json")
        assert BitPlan.load(tmp_path / "plan.json").digest == plan.digest
        assert ("zero_points" in (tmp_path / "plan.json").read_text()) is (target is POINTED)
    # Two groups of 8 channels have a code of 4 bits more each.
    assert plan.weight_bytes == uniform_plan(shapes, 4, CPU, "d" * 64).weight_bytes + 2 * 8 // 2
    made = quantize_channels(np.ones((8, 100), np.float32), 4, pointed)
    assert made.nbytes == plan.weight_bytes


@pytest.mark.parametrize("name", ["cuda", "rtx4070", "orin-jp7", "orin-jp6"])
def test_other_targets_refuse_with_the_reason(name: str) -> None:
    with pytest.raises(UnsupportedOnTarget, match="has no zero points"):
        find_target(name, zero_points=True)
    assert find_target("cpu", zero_points=True) == POINTED


def test_quantizers_are_compared_with_zero_points_where_there_are_some() -> None:
    pointed = {name for name in variants(CPU) if "zero points" in name}
    leveled = {name for name in variants(CPU) if "two-level" in name}
    assert set(variants(find_target("rtx4070"))) == set(variants(CPU)) - pointed - leveled
    assert len(pointed) == len(leveled) == 2
    for name in pointed:
        plain = variants(CPU)[name.removesuffix(", zero points")]
        assert all(rule.zero_points for rule in variants(CPU)[name].rules.values())
        assert replace(variants(CPU)[name], rules=plain.rules) == plain


def test_plan_and_containers_must_agree() -> None:
    with pytest.raises(QvlaError, match="zero points"):
        uniform_plan({"a": (8, 100)}, 4, CPU, "d" * 64, spec_for(POINTED))


@pytest.mark.parametrize("channels", [1, 5, 12, 30])
@pytest.mark.parametrize("inputs", [20, 64, 150, 200])
def test_buckets_on_ort_compute_with_zero_points(
    channels: int, inputs: int, tmp_path: Path
) -> None:
    # Around 0.5, so that zero points are far from 0.
    check_buckets_on_ort(POINTED, 0.5, channels, inputs, tmp_path)


def test_compensated_codes_with_zero_points_are_packed(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    observations = [*tiny_observations(6), *tiny_observations(8, seed=8)]
    plan = check_compensated_bundle(POINTED, tiny_policy, observations, tmp_path)
    assert plan.rounding is not None and plan.weight_bytes > mixed_plan(tiny_policy).weight_bytes
    zeros = [layer.zero_points for layer in plan.rounding.layers.values()]
    assert any(found is not None and found.any() for found in zeros)


def test_zero_points_of_another_shape_are_refused() -> None:
    codes, halves = np.zeros((2, 3), np.int8), np.zeros((0, 3), np.float16)
    scales = np.ones((2, 1), np.float32)
    with pytest.raises(QvlaError, match="do not go with"):
        RoundedLayer(codes, halves, scales, np.zeros((2, 9), np.int8))


def test_a_run_measures_plans_and_packs_zero_points(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    check_run(POINTED, tiny_policy, tiny_observations(12), tmp_path)
