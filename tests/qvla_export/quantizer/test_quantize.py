"""The quantizer: the official functions' numbers, and properties that hold for any weights."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from engines.targets import find_target
from qvla_export.quantizer.layer_names import kept_kind_of
from qvla_export.quantizer.quantize import (
    CODE_RANGE,
    QuantizerSpec,
    ScaleRule,
    WidthRule,
    as_rows,
    fake_quantize,
    quantize_channels,
    spec_for,
)
from qvla_export.quantizer.scale_search import Steps
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.target import Container, ScaleForm, Target


def spec(scale: ScaleRule = "max", group: int | None = None, scale_bits: int = 32) -> QuantizerSpec:
    return QuantizerSpec({bits: WidthRule(group, scale, scale_bits) for bits in CODE_RANGE})


# Rows of ordinary size, with zeros, ties, repeated values and outliers.
WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(1, 40)),
    elements=st.one_of(
        st.floats(-2, 2, width=32), st.sampled_from([0.0, 1.0, -1.0, 0.5, 0.25, 30.0])
    ),
)
SPECS = st.builds(
    spec, st.sampled_from(["max", "mse"]), st.sampled_from([None, 1, 7, 16]), st.just(32)
)


@pytest.mark.parametrize("bits", [0, 2, 4, 8])
def test_max_scales_reproduce_the_official_quantizer(oracles: Path, bits: int) -> None:
    arrays = np.load(oracles / "quantization" / "row_quant.npz")
    expected = arrays[f"fake_quantize_tensor_sym_fp32_b{bits}"]
    quantized = quantize_channels(arrays["rows_fp32"], bits, spec())
    np.testing.assert_allclose(quantized.dequantize(), expected, rtol=1e-6, atol=1e-12)


def test_gates_change_weights_as_the_official_injection_does(oracles: Path) -> None:
    gates = json.loads((oracles / "quantization" / "gates.json").read_text())
    with np.load(oracles / "quantization" / "inject.npz") as archive:
        golden = dict(archive)
    injected = 0
    for key, before in golden.items():
        name = key.removeprefix("before/").removesuffix(".weight")
        if not key.startswith("before/") or not key.endswith(".weight"):
            continue
        rows, after = as_rows(before), as_rows(golden[f"after/{name}.weight"])
        if kept_kind_of(name) != "other":
            np.testing.assert_array_equal(after, rows)
            continue
        widths = np.array(gates.get(name) or gates[name.partition(".")[2]], np.int8)
        if len(widths) != len(rows):
            # Upstream takes the lower median for all channels, without a word.
            with pytest.raises(QvlaError, match="need as many widths"):
                fake_quantize(rows, widths, spec())
            lower = np.sort(widths)[(len(widths) - 1) // 2]
            widths = np.full(len(rows), lower, np.int8)
        found, half = fake_quantize(rows, widths, spec()), widths == 16
        np.testing.assert_allclose(found[~half], after[~half], rtol=1e-6, atol=1e-6)
        # Upstream leaves 16 bits as they are, in whatever type that is.
        np.testing.assert_array_equal(after[half], rows[half])
        injected += 1
    assert injected == int(golden["injected"])


def test_sixteen_bits_are_float16() -> None:
    rows = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    quantized = quantize_channels(rows, 16, spec())
    assert quantized.codes.dtype == np.float16
    np.testing.assert_array_equal(
        quantized.dequantize(), rows.astype(np.float16).astype(np.float32)
    )


@settings(deadline=None)
@given(WEIGHTS, SPECS, st.sampled_from(sorted(CODE_RANGE)))
def test_codes_stay_in_range_and_scales_are_positive(
    weight: NDArray[np.float32], quantizer: QuantizerSpec, bits: int
) -> None:
    quantized = quantize_channels(weight, bits, quantizer)
    low, high = CODE_RANGE[bits]
    assert quantized.codes.dtype == np.int8
    assert quantized.codes.shape == weight.shape
    assert quantized.codes.min() >= low and quantized.codes.max() <= high
    assert (quantized.scales > 0).all() and np.isfinite(quantized.scales).all()
    assert np.isfinite(quantized.dequantize()).all()


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from([None, 1, 7, 16]), st.sampled_from(sorted(CODE_RANGE)))
def test_quantizing_twice_changes_nothing(
    weight: NDArray[np.float32], group: int | None, bits: int
) -> None:
    once = quantize_channels(weight, bits, spec("max", group)).dequantize()
    twice = quantize_channels(once, bits, spec("max", group)).dequantize()
    np.testing.assert_allclose(twice, once, rtol=1e-5, atol=1e-12)


@settings(deadline=None)
@given(
    st.sampled_from(sorted(CODE_RANGE)),
    st.sampled_from(["max", "mse"]),
    st.floats(2**-10, 2**10, width=32),
    st.data(),
)
def test_representable_rows_come_back(
    bits: int, rule: ScaleRule, scale: float, data: st.DataObject
) -> None:
    low, high = CODE_RANGE[bits]
    codes = data.draw(hnp.arrays(np.int64, 12, elements=st.integers(-high, high)))
    codes[0] = high
    if rule == "mse":
        codes[1] = data.draw(st.sampled_from([0, low]))  # the extra negative level
    weight = (codes * np.float32(scale)).astype(np.float32)[None]
    restored = quantize_channels(weight, bits, spec(rule)).dequantize()
    np.testing.assert_allclose(restored, weight, rtol=1e-5, atol=1e-12)


@settings(deadline=None, max_examples=300)
@given(WEIGHTS, st.sampled_from([None, 7, 16]))
def test_more_bits_never_mean_more_error(weight: NDArray[np.float32], group: int | None) -> None:
    errors = [
        np.square(quantize_channels(weight, bits, spec("mse", group)).dequantize() - weight)
        for bits in (0, 2, 4, 8)
    ]
    sums = [error.astype(np.float64).sum() for error in errors]
    tolerance = 1e-9 * max(1.0, sums[0])
    assert all(more <= less + tolerance for less, more in pairwise(sums)), sums


@settings(deadline=None)
@given(WEIGHTS, st.sampled_from([2, 4, 8]))
def test_searched_scales_are_no_worse_than_max_scales(
    weight: NDArray[np.float32], bits: int
) -> None:
    searched = quantize_channels(weight, bits, spec("mse")).dequantize() - weight
    plain = quantize_channels(weight, bits, spec("max")).dequantize() - weight
    rounding = 1e-6 * np.square(weight).sum()
    assert np.square(searched).sum() <= np.square(plain).sum() + rounding


@pytest.mark.parametrize("rule", ["max", "mse"])
@pytest.mark.parametrize("scale_bits", [16, 32])
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-12, 3.0, 6e4])
def test_constant_zero_and_extreme_rows_stay_finite(
    rule: ScaleRule, scale_bits: int, value: float
) -> None:
    weight = np.full((2, 9), value, np.float32)
    for bits in (0, 2, 4, 8, 16):
        result = quantize_channels(weight, bits, spec(rule, 4, scale_bits)).dequantize()
        assert np.isfinite(result).all()
        assert (np.abs(result - weight) <= abs(value) * 1.01).all()


def test_input_moments_move_the_error_to_unimportant_inputs() -> None:
    generator = np.random.default_rng(1)
    weight = generator.standard_normal((8, 64)).astype(np.float32)
    moment = np.where(np.arange(64) < 8, 100.0, 0.01).astype(np.float32)

    def weighted_error(given: NDArray[np.float32] | None) -> float:
        restored = quantize_channels(weight, 2, spec("mse"), given).dequantize()
        return float((np.square(restored - weight) * moment).sum())

    assert weighted_error(moment) < 0.9 * weighted_error(None)


def test_half_scales_are_rounded_before_the_codes() -> None:
    weight = np.random.default_rng(2).standard_normal((5, 70)).astype(np.float32)
    quantized = quantize_channels(weight, 4, spec("mse", 32, 16))
    assert quantized.scales.dtype == np.float16
    assert quantized.scales.shape == (5, 3)
    assert quantized.nbytes == 5 * 70 // 2 + 5 * 3 * 2
    halves = quantized.scales.astype(np.float32).repeat(32, axis=1)[:, :70]
    inside = np.abs(weight) < 7 * halves
    assert (np.abs(quantized.dequantize() - weight)[inside] <= halves[inside] * 0.5001).all()


@pytest.mark.parametrize("form", ["group", "two-level"])
def test_kept_scales_are_not_searched_again(
    form: ScaleForm, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = np.random.default_rng(1).standard_normal((10, 96)).astype(np.float32)
    widths = np.array([0, 2, 4, 8, 16] * 2, np.int8)
    rules = spec_for(find_target("cpu", scales=form))
    kept: dict[int, Steps] = {}
    first = fake_quantize(weight, widths, rules, kept=kept)
    assert np.array_equal(first, fake_quantize(weight, widths, rules)) and set(kept) == {2, 4, 8}
    monkeypatch.setattr("qvla_export.quantizer.quantize.channel_steps", None)
    assert np.array_equal(first, fake_quantize(weight, widths, rules, kept=kept))


def test_fake_quantize_mixes_widths() -> None:
    weight = np.random.default_rng(3).standard_normal((10, 33)).astype(np.float32)
    widths = np.array([16, 8, 4, 2, 0] * 2, np.int8)
    mixed = fake_quantize(weight, widths, spec("mse", 16))
    for bits in (0, 2, 4, 8, 16):
        rows = widths == bits
        alone = quantize_channels(weight[rows], bits, spec("mse", 16)).dequantize()
        np.testing.assert_array_equal(mixed[rows], alone)
    assert as_rows(np.zeros((4, 3, 2, 2), np.float32)).shape == (4, 12)


def test_target_decides_groups_and_scale_bits() -> None:
    target = Target(
        "t",
        "ort",
        ">=1",
        21,
        10,
        {16: Container(16, None, 0), 8: Container(8, None, 16), 2: Container(2, 64, 32)},
    )
    quantizer = spec_for(target)
    assert quantizer.rules == {8: WidthRule(None, "max", 16), 2: WidthRule(64, "mse", 32)}
    assert QuantizerSpec.from_json(quantizer.to_json()) == quantizer
    with pytest.raises(QvlaError, match="no rule for 4 bits"):
        quantize_channels(np.ones((1, 4), np.float32), 4, quantizer)


def test_bad_input_is_refused() -> None:
    with pytest.raises(QvlaError, match="NaN"):
        quantize_channels(np.full((1, 2), np.nan, np.float32), 4, spec())
    with pytest.raises(QvlaError, match="as_rows"):
        quantize_channels(np.zeros((1, 2, 3), np.float32), 4, spec())
    with pytest.raises(QvlaError, match="bits must be one of"):
        quantize_channels(np.zeros((1, 2), np.float32), 3, spec())
    with pytest.raises(QvlaError, match="input_second_moment"):
        quantize_channels(np.zeros((1, 2), np.float32), 4, spec("mse"), np.ones(3, np.float32))
    with pytest.raises(QvlaError, match="as many widths"):
        fake_quantize(np.zeros((2, 2), np.float32), np.zeros(3, np.int8), spec())
    with pytest.raises(QvlaError, match="group_size"):
        WidthRule(0)
    with pytest.raises(ArtifactError, match="not a quantizer"):
        QuantizerSpec.from_json({"4": {"group": 3}})
