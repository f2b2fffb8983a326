"""How ranges of rounded activations are chosen from what layers are fed."""

from collections.abc import Callable
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from rounded_numbers import int8_rounded
from torch import nn

from engines.targets import CPU
from qvla_export.measurement.measure_activations import add_numbers, measure_activations
from qvla_export.policies.layers import traced_layers
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activation_statistics import ActivationStatistics, Histogram
from qvla_export.quantizer.activations import (
    METHODS,
    TOKEN_SHARES,
    ActivationRanges,
    HistogramMethod,
    storable_range,
)
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.observation import Observation

SPEC = spec_for(CPU)
Make = Callable[..., list[Observation]]
ONE_RANGE: tuple[HistogramMethod, ...] = get_args(HistogramMethod)


def histogram_of(*parts: NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    for part in parts:
        add_numbers(histogram, torch.from_numpy(part), "layer")
    return histogram


@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40),
    st.integers(0, 40),
    st.floats(1e-3, 1e3),
)
def test_a_histogram_does_not_depend_on_order_or_split(
    values: list[float], cut: int, factor: float
) -> None:
    numbers = np.array(values, np.float32) * np.float32(factor)
    whole = histogram_of(numbers)
    parts = histogram_of(numbers[::-1][:cut].copy(), numbers[::-1][cut:].copy(), numbers[:0])
    assert (parts.exponent, parts.largest) == (whole.exponent, whole.largest)
    assert np.array_equal(parts.counts, whole.counts)
    assert whole.counts.sum() == len(numbers)
    bins = np.floor(np.abs(numbers.astype(np.float64)) / whole.width)
    assert np.array_equal(np.flatnonzero(whole.counts), np.unique(bins))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(QvlaError, match="layer is fed NaN or infinity"):
        histogram_of(np.array([0, value], np.float32))


def test_methods_choose_what_they_say() -> None:
    heavy = np.random.default_rng(0).standard_t(3, 200_000).astype(np.float32)
    histogram = histogram_of(heavy)
    found = {method: histogram.range(method, 8) for method in ONE_RANGE}
    sizes = np.abs(heavy)
    assert found["max"] == sizes.max()
    assert found["percentile"] == pytest.approx(np.quantile(sizes, 0.9999), rel=0.01)
    errors = {
        limit: float(np.square(int8_rounded(heavy, np.float32(limit / 127)) - heavy).mean())
        for limit in (*found.values(), *(sizes.max() * np.linspace(0.1, 1, 30)))
    }
    assert errors[found["mse"]] <= 1.01 * min(errors.values())
    assert found["entropy"] < found["mse"] < found["max"]


def test_even_numbers_keep_their_whole_range() -> None:
    even = np.linspace(-3, 3, 50_001, dtype=np.float32)
    for method in ONE_RANGE:
        assert histogram_of(even).range(method, 8) == pytest.approx(3, rel=0.05)


def test_four_bits_get_a_smaller_range_than_eight() -> None:
    histogram = histogram_of(np.random.default_rng(0).standard_normal(50_000).astype(np.float32))
    assert histogram.range("mse", 4) < histogram.range("mse", 8)


def test_zeros_have_a_range() -> None:
    for method in ONE_RANGE:
        assert histogram_of(np.zeros(5, np.float32)).range(method, 8) == 1


@given(st.floats(1e-30, 1e30), st.sampled_from([4, 8]))
def test_scales_are_float16_numbers(limit: float, bits: int) -> None:
    scale = ActivationRanges(bits, "max", {"x": storable_range(limit, bits)}).scale("x")
    assert scale == np.float16(scale) > 0
    if 1e-2 < limit < 1e5:
        assert scale * (127 if bits == 8 else 7) == pytest.approx(limit, rel=2**-10)


def test_layers_of_one_input_share_a_histogram(
    tiny_policy: OftPolicy, statistics: ActivationStatistics
) -> None:
    groups = {name: group for group in statistics.histograms for name in group}
    assert set(groups) == set(tiny_policy.layers())
    for name, group in groups.items():
        parent, _, last = name.rpartition(".")
        if last == "q_proj":
            assert group == tuple(f"{parent}.{x}_proj" for x in "qkv")
        elif last == "gate_proj":
            assert group == (name, f"{parent}.up_proj")
        elif last in ("fc1", "fc2", "down_proj", "o_proj", "projection"):
            assert group == (name,)


def test_the_range_is_the_largest_number_a_layer_is_fed(
    tiny_policy: OftPolicy, tiny_observations: Make, statistics: ActivationStatistics
) -> None:
    largest: dict[str, float] = {}
    name = "language_model.model.layers.0.mlp.down_proj"
    handle = traced_layers(tiny_policy)[name].register_forward_pre_hook(
        lambda module, inputs: largest.update({name: float(inputs[0].abs().max())})
    )
    found = []
    with torch.no_grad():
        for observation in tiny_observations(4):
            tiny_policy.normalized_actions(tiny_policy.batch([observation]))
            found.append(largest[name])
    handle.remove()
    assert statistics.ranges(8, "max").ranges[name] == pytest.approx(max(found), rel=2**-10)


def test_statistics_are_the_same_in_any_order_and_survive_a_file(
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    statistics: ActivationStatistics,
    tmp_path: Path,
) -> None:
    backwards = measure_activations(tiny_policy, tiny_observations(4)[::-1], "set")
    backwards.save(tmp_path / "a")
    statistics.save(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = ActivationStatistics.load(tmp_path / "a")
    for method in METHODS:
        assert loaded.ranges(8, method) == statistics.ranges(8, method)
    (tmp_path / "a").write_bytes((tmp_path / "b").read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="activation statistics"):
        ActivationStatistics.load(tmp_path / "a")


def test_no_observations_and_no_such_width_are_refused(
    tiny_policy: OftPolicy, statistics: ActivationStatistics
) -> None:
    with pytest.raises(QvlaError, match="at least one observation"):
        measure_activations(tiny_policy, [], "set")
    with pytest.raises(QvlaError, match="8 bits, or 4"):
        statistics.ranges(6, "max")


def test_layers_of_images_keep_one_range(
    tiny_policy: OftPolicy, statistics: ActivationStatistics
) -> None:
    for bits in (8, 4):
        by_tokens = statistics.ranges(bits, "token")
        others = statistics.ranges(bits, "percentile" if bits == 8 else "mse")
        for name, layer in tiny_policy.layers().items():
            linear = isinstance(layer, nn.Linear)
            assert (name in by_tokens.per_token) == linear
            expected = storable_range(TOKEN_SHARES[bits], bits) if linear else others.ranges[name]
            assert by_tokens.ranges[name] == expected
