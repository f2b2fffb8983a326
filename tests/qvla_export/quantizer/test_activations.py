"""Rounded activations: how ranges are chosen, torch's rounding, and the nodes of the graph."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from ort_graphs import constant, run_model
from tiny_bundles import make_bundle, mixed_plan
from torch import nn

from calibration.calibration_set import CalibrationSet
from engines.load import load_engine
from engines.targets import CPU
from engines.verify import action_drift
from qvla_export.allocation.setting import parse_setting
from qvla_export.measurement.measure_activations import add_numbers, measure_activations
from qvla_export.pipeline import export as exporting
from qvla_export.pipeline.activations import activations as record_activations
from qvla_export.pipeline.plan import PlanOptions
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.layers import fake_quantized, rounded_inputs, traced_layers
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activation_statistics import ActivationStatistics, Histogram
from qvla_export.quantizer.activations import (
    METHODS,
    SMALLEST_TOKEN,
    TOKEN_SHARES,
    ActivationRanges,
    HistogramMethod,
    RangeMethod,
    storable_range,
)
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.observation import Observation

SPEC = spec_for(CPU)
Make = Callable[..., list[Observation]]
ONE_RANGE: tuple[HistogramMethod, ...] = get_args(HistogramMethod)


@pytest.fixture(scope="module")
def statistics(tiny_policy: OftPolicy, tiny_observations: Make) -> ActivationStatistics:
    return measure_activations(tiny_policy, tiny_observations(4), "set")


@pytest.fixture(scope="module")
def plan(tiny_policy: OftPolicy, statistics: ActivationStatistics) -> BitPlan:
    return replace(mixed_plan(tiny_policy), activations=statistics.ranges(8, "percentile"))


@pytest.fixture(scope="module")
def plan_by_tokens(plan: BitPlan, statistics: ActivationStatistics) -> BitPlan:
    return replace(plan, activations=statistics.ranges(8, "token"))


def ranges_of(limit: float, *layers: str) -> ActivationRanges:
    return ActivationRanges(8, "max", dict.fromkeys(layers, limit))


def rounded(values: NDArray[np.float32], scale: np.float32) -> NDArray[np.float32]:
    codes: NDArray[np.float32] = np.clip(np.rint(values / scale), -128, 127).astype(np.float32)
    return codes * scale


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
        limit: float(np.square(rounded(heavy, np.float32(limit / 127)) - heavy).mean())
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


@pytest.mark.parametrize("zero", [np.int8(0), np.uint8(128)])
def test_torch_rounds_as_onnx_runtime_does(zero: NDArray[np.generic], tmp_path: Path) -> None:
    activations = ranges_of(storable_range(2.9, 8), "x")
    scale = activations.scale("x")
    halves = (np.arange(-300, 300) / 2).astype(np.float32) * scale
    near = np.concatenate([np.nextafter(halves, np.float32(s)) for s in (-9e9, 9e9)])
    noise = np.random.default_rng(0).normal(0, 2, 5000).astype(np.float32)
    values = np.concatenate([halves, near, noise])[None]
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, values.shape)
    ends = [constant(tape, "s", np.array(scale)), constant(tape, "z", np.array(zero))]
    y = tape.op("DequantizeLinear", [tape.op("QuantizeLinear", [x, *ends]), *ends])
    y.name, y.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(
        [x], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 25}
    )
    expected = run_model(ir.Model(graph, ir_version=13), values, tmp_path)
    layer = nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(1)
    layer.requires_grad_(False)
    inputs = torch.from_numpy(values.T.copy()).requires_grad_()
    with rounded_inputs({"x": layer}, activations):
        output = layer(inputs)
    assert np.array_equal(output.detach().numpy().T, expected)
    assert np.array_equal(expected, rounded(values, scale))
    output.sum().backward()
    assert inputs.grad is not None and bool((inputs.grad == 1).all())
    assert bool((layer(inputs) == inputs).all())


@given(
    st.lists(st.lists(st.floats(-100, 100, width=16), min_size=3, max_size=3), min_size=1),
    st.sampled_from([4, 8]),
    st.booleans(),
)
def test_each_token_is_rounded_in_its_own_range(
    values: list[list[float]], bits: int, leaves: bool
) -> None:
    """What leaves the graph is neither rounded nor looked at."""
    layer = nn.Linear(3, 3, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.eye(3))
    share = storable_range(TOKEN_SHARES[bits], bits)
    ranges = ActivationRanges(bits, "token", {"x": share}, frozenset({"x"}))
    numbers = np.array(values, np.float32)
    gone = np.array([1] if leaves else [], np.int64)
    with rounded_inputs({"x": layer}, ranges, {"x": gone}):
        found = layer(torch.from_numpy(numbers)).numpy()
    kept = np.delete(numbers, gone, axis=1)
    sizes = np.maximum(np.abs(kept).max(axis=1, keepdims=True), np.float32(SMALLEST_TOKEN))
    scale = ranges.scale("x")
    codes = np.clip(np.rint(kept / sizes / scale), *ranges.codes)
    assert np.array_equal(np.delete(found, gone, axis=1), codes.astype(np.float32) * scale * sizes)
    assert np.array_equal(found[:, gone], numbers[:, gone])


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


def test_hooks_leave_even_on_an_error(tiny_policy: OftPolicy, plan: BitPlan) -> None:
    with pytest.raises(ZeroDivisionError), fake_quantized(tiny_policy, plan):
        raise ZeroDivisionError
    assert not any(len(layer._forward_pre_hooks) for layer in tiny_policy.layers().values())


def test_a_plan_keeps_which_ranges_are_of_tokens(plan_by_tokens: BitPlan, tmp_path: Path) -> None:
    path, kept = tmp_path / "plan.json", plan_by_tokens.activations
    assert kept is not None and kept.per_token
    plan_by_tokens.save(path)
    assert BitPlan.load(path).activations == kept
    names = list(plan_by_tokens.widths)[-2:]
    part = plan_by_tokens.restricted_to(names).activations
    assert part is not None and part.per_token == set(names)
    value = json.loads(path.read_text())
    for damaged in ("all", [1], ["no such layer"]):
        path.write_text(
            json.dumps({**value, "activations": {**value["activations"], "per_token": damaged}})
        )
        with pytest.raises(ArtifactError, match="damaged"):
            BitPlan.load(path)


def test_a_plan_keeps_its_ranges(plan: BitPlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    assert BitPlan.load(path).activations == plan.activations
    value = json.loads(path.read_text())
    # The bytes are those of what a graph without rounded inputs stores.
    replace(plan, activations=None).save(path)
    unrounded = json.loads(path.read_text())
    for old in ("none", None):
        path.write_text(json.dumps({**unrounded, "activations": old}))
        assert BitPlan.load(path).activations is None
    ranges = value["activations"]["ranges"]
    for damaged in (
        {**value["activations"], "bits": 5},
        {**value["activations"], "method": "guess"},
        {**value["activations"], "ranges": {**ranges, next(iter(ranges)): -1.0}},
        {**value["activations"], "ranges": dict(list(ranges.items())[1:])},
        {**value["activations"], "ranges": {**ranges, "other": 1.0}},
        "int8",
    ):
        path.write_text(json.dumps({**value, "activations": damaged}))
        with pytest.raises(ArtifactError, match="damaged"):
            BitPlan.load(path)


def test_some_layers_of_a_plan_keep_their_ranges(plan: BitPlan) -> None:
    names = list(plan.widths)[:3]
    part = plan.restricted_to(names).activations
    assert part is not None and list(part.ranges) == names


def actions_under(policy: OftPolicy, plan: BitPlan, seen: list[Observation]) -> NDArray[np.float32]:
    with fake_quantized(policy, plan), torch.no_grad():
        chunks = [policy.greedy_actions(policy.batch([item])).numpy() for item in seen]
    return np.concatenate(chunks)


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "token"])
def test_ranges_move_actions_little(
    method: RangeMethod,
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    statistics: ActivationStatistics,
) -> None:
    seen = tiny_observations(3, seed=5)
    plain = mixed_plan(tiny_policy)
    activated = replace(plain, activations=statistics.ranges(8, method))
    moved = actions_under(tiny_policy, activated, seen) - actions_under(tiny_policy, plain, seen)
    assert 0 < np.sqrt(np.square(moved).mean()) < 0.05


@pytest.mark.parametrize("by", ["plan", "plan_by_tokens"])
def test_the_engine_rounds_as_torch_does(
    by: str,
    tiny_policy: OftPolicy,
    tiny_observations: Make,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Every width in every layer, hidden units that left their MLP among them."""
    plan: BitPlan = request.getfixturevalue(by)
    seen = tiny_observations(8, seed=3)
    bundle = make_bundle(tiny_policy, plan, seen, tmp_path / "bundle")
    golden = bundle.golden()
    with load_engine(bundle, threads=1) as engine:
        got = np.concatenate([engine.infer(feeds)["actions"] for feeds in golden.feeds])
    drift = np.abs(got - golden.reference).max(axis=(1, 2))
    floats = actions_under(tiny_policy, replace(plan, activations=None), seen)
    moved = np.abs(floats - golden.reference).max(axis=(1, 2))
    # Torch and the engine add in another order, so now and then a number rounds to the next code.
    assert np.median(drift) < 1e-5 and drift.max() < 0.5 * moved.max()


def test_from_calibration_to_an_engine(
    tiny_policy: OftPolicy, tiny_observations: Make, tmp_path: Path
) -> None:
    run, setting = RunFolder(tmp_path / "run"), parse_setting("w8a8-rtn")
    drawn = tuple(tiny_observations(8))
    CalibrationSet(drawn[:4], drawn[4:], {"test": 1}).save(run.calibration)
    sensitivities(run, tiny_policy, CPU, SensitivityRequest(quantizer="nearest", probes=2))
    with pytest.raises(ArtifactError, match="qvla activations"):
        plan_setting(run, setting, CPU, tiny_policy.digest)
    record_activations(run, tiny_policy)
    planned = plan_setting(run, setting, CPU, tiny_policy.digest, PlanOptions("mse"))
    assert planned is not None and planned.activations is not None
    assert planned.activations.method == "mse"
    assert planned.calibration_digest == CalibrationSet.load(run.calibration).digest
    bundle = exporting.export(run, setting, tiny_policy, CPU)
    golden = bundle.golden()
    for weights in ("packed", "unpacked"):
        with load_engine(bundle, threads=1, weights=weights) as engine:
            got = np.concatenate([engine.infer(feeds)["actions"] for feeds in golden.feeds])
        drift = action_drift(golden.reference, got, np.ones(4))
        moved = action_drift(golden.reference, golden.full_precision, np.ones(4))
        # Torch and the engine add in another order, so a few numbers round to the next code.
        assert drift.mean_normalized.max() <= 0.5 * moved.mean_normalized.max()


@pytest.mark.parametrize(
    ("name", "kind", "bits", "activations"),
    [
        ("w8a8", "planned", 8, 8),
        ("w4a8", "planned", 4, 8),
        ("w2.5a8", "planned", 2.5, 8),
        ("w4a4-rtn", "uniform", 4, 4),
        ("w8a8-rtn", "uniform", 8, 8),
        ("w4", "planned", 4, None),
    ],
)
def test_setting_names(name: str, kind: str, bits: float, activations: int | None) -> None:
    setting = parse_setting(name)
    assert (setting.kind, setting.bits, setting.activation_bits) == (kind, bits, activations)


@pytest.mark.parametrize("name", ["w8a16", "w8a", "a8", "w8a8-", "w0a8", "floata8", "w3a8-rtn"])
def test_names_of_no_setting_are_refused(name: str) -> None:
    with pytest.raises(QvlaError):
        parse_setting(name)
