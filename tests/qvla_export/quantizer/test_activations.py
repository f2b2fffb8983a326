"""Rounded activations: torch's rounding, plans that hold ranges, and the nodes of the graph."""

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
from rounded_numbers import int8_rounded
from tiny_bundles import make_bundle, mixed_plan
from torch import nn

from calibration.calibration_set import CalibrationSet
from engines.load import load_engine
from engines.targets import CPU
from engines.verify import action_drift
from qvla_export.allocation.setting import parse_setting
from qvla_export.pipeline import export as exporting
from qvla_export.pipeline.activations import activations as record_activations
from qvla_export.pipeline.plan import PlanOptions
from qvla_export.pipeline.plan import plan as plan_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.policies.layers import fake_quantized, rounded_inputs
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activation_statistics import ActivationStatistics
from qvla_export.quantizer.activations import (
    SMALLEST_TOKEN,
    TOKEN_SHARES,
    ActivationRanges,
    HistogramMethod,
    RangeMethod,
    storable_range,
)
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import spec_for
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation

SPEC = spec_for(CPU)
Make = Callable[..., list[Observation]]
ONE_RANGE: tuple[HistogramMethod, ...] = get_args(HistogramMethod)


@pytest.fixture(scope="module")
def plan(tiny_policy: OftPolicy, statistics: ActivationStatistics) -> BitPlan:
    return replace(mixed_plan(tiny_policy), activations=statistics.ranges(8, "percentile"))


@pytest.fixture(scope="module")
def plan_by_tokens(plan: BitPlan, statistics: ActivationStatistics) -> BitPlan:
    return replace(plan, activations=statistics.ranges(8, "token"))


def ranges_of(limit: float, *layers: str) -> ActivationRanges:
    return ActivationRanges(8, "max", dict.fromkeys(layers, limit))


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
    assert np.array_equal(expected, int8_rounded(values, scale))
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
