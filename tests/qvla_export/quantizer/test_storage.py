"""The plan's bytes are the exported graph's, to the byte, and nothing is read before it must be."""

from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ort_graphs import LAYER, linear_model
from small_plans import random_sensitivities
from tiny_bundles import float_graph, make_bundle
from tiny_policy import tiny_observations

from engines.targets import CPU, RTX4070, TARGETS
from qvla_export.allocation.plan_request import PlanRequest, shapes_of
from qvla_export.allocation.setting import parse_setting
from qvla_export.graph.lowering import lower
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.float_storage import store_exactly
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.packed_storage import takes_whole_groups
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.plan_bytes import PackedForm, PlanBytes, stored_bytes
from qvla_export.quantizer.quantize import spec_for
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.target import Target

FORMS = {
    "cpu": CPU,
    "zero-points": CPU.with_zero_points(),
    "two-level": CPU.with_two_level_scales(),
    "rtx4070": RTX4070,
    "rtx4070, two-level": RTX4070.with_two_level_scales(),
}
WIDTHS = [0, 2, 4, 8, 16]


def random_plan(policy: OftPolicy, target: Target, seed: int) -> BitPlan:
    """Layers of many mixtures: some of one width, some all pruned."""
    generator = np.random.default_rng(seed)
    plan = uniform_plan(layer_shapes(policy.layers()), 4, target, policy.digest)
    widths = {}
    for name, layer in plan.widths.items():
        shares = generator.dirichlet(np.full(5, 0.4))
        widths[name] = generator.choice(WIDTHS, len(layer), p=shares).astype(np.int8)
    return replace(plan, widths=widths)


def with_rounded_inputs(plan: BitPlan) -> BitPlan:
    return replace(plan, activations=ActivationRanges(8, "max", dict.fromkeys(plan.widths, 2.0)))


@pytest.mark.parametrize("rounded_inputs", [False, True], ids=["w", "w-a8"])
@pytest.mark.parametrize("form", FORMS)
def test_plan_states_the_bytes_of_the_graph(
    form: str, rounded_inputs: bool, tiny_policy: OftPolicy
) -> None:
    plan = random_plan(tiny_policy, FORMS[form], 10 * list(FORMS).index(form) + rounded_inputs)
    if rounded_inputs:
        plan = with_rounded_inputs(plan)
    _, parts = lower(float_graph(tiny_policy), plan, FORMS[form])
    biases, _ = parts.pop("biases"), parts.pop("rest")
    packed = PackedForm(plan.containers, rounded_inputs, compensated=True)
    assert sum(parts.values()) == stored_bytes(plan.widths, plan.weights_per_channel, packed)
    stated = plan.weight_bytes - sum(parts.values())
    # A graph that computes in 16 bits may hold biases so.
    assert stated / 2 <= biases <= stated if "rtx" in form else biases == stated


@settings(max_examples=25, deadline=None)
@given(
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=60),
    inputs=st.integers(1, 300),
    form=st.sampled_from(sorted(FORMS)),
    rounded_inputs=st.booleans(),
)
def test_layers_have_the_stated_bytes(
    widths: list[int], inputs: int, form: str, rounded_inputs: bool
) -> None:
    weight = np.ones((len(widths), inputs), np.float32)
    layer, target = {LAYER: np.array(widths, np.int8)}, FORMS[form]
    how = spec_for(target)
    model = bucketize(linear_model(weight, None), layer, how, target, rounded_inputs=rounded_inputs)
    constants = [v.const_value for v in model.graph.initializers.values()]
    packed = PackedForm(target.containers, rounded_inputs)
    # All pruned: the shape of the zeros, which is the graph's.
    shape = 0 if any(widths) else 8 + 4
    stated = stored_bytes(layer, {LAYER: inputs}, packed) + shape
    assert sum(t.nbytes for t in constants if t is not None) == stated


@pytest.mark.parametrize("form", FORMS)
def test_plans_tried_in_turn_are_counted_as_one_alone(form: str, tiny_policy: OftPolicy) -> None:
    """A channel or a layer changes from plan to plan, and changes back."""
    plan, generator = random_plan(tiny_policy, FORMS[form], 3), np.random.default_rng(3)
    packed = PackedForm(plan.containers, rounded_inputs=form == "cpu")
    count, names = PlanBytes(plan.weights_per_channel, packed), sorted(plan.widths)
    first = dict(plan.widths)
    tried = [first]
    for step in range(30):
        name = generator.choice(names)
        layer = tried[-1][name].copy()
        where = slice(None) if step % 5 == 0 else generator.integers(len(layer))
        layer[where] = generator.choice(WIDTHS)
        tried.append({**tried[-1], name: layer})
    for widths in (*tried, first):
        assert count.of(widths) == stored_bytes(widths, plan.weights_per_channel, packed)


def bytes_in_files(bundle: Bundle) -> int:
    """Bytes of all constants, as the bundle's own files say."""
    found = 0
    for part in bundle.parts:
        model = onnx.load(bundle.model_path(part), load_external_data=False)
        for constant in model.graph.initializer:
            lengths = [int(e.value) for e in constant.external_data if e.key == "length"]
            found += lengths[0] if lengths else len(constant.raw_data)
    return found


@pytest.mark.parametrize("rounded_inputs", [False, True], ids=["w", "w-a8"])
def test_plan_states_the_bytes_in_a_bundles_files(
    rounded_inputs: bool, tiny_policy: OftPolicy, tmp_path: Path
) -> None:
    seen = tiny_observations(1)
    plan = random_plan(tiny_policy, CPU, 5)
    if rounded_inputs:
        plan = with_rounded_inputs(plan)
    floats = make_bundle(tiny_policy, None, seen, tmp_path / "float")
    bundle = make_bundle(tiny_policy, plan, seen, tmp_path / "planned")
    assert bytes_in_files(floats) == sum(floats.weight_bytes.values())
    assert bytes_in_files(bundle) == sum(bundle.weight_bytes.values())
    # The shapes of what convolutions become, and ranges of rounded inputs, are the graph's.
    rest = bundle.weight_bytes["rest"]
    assert rest < 1.01 * floats.weight_bytes["rest"]
    assert bytes_in_files(bundle) - rest == plan.weight_bytes
    assert plan.weight_bytes == bundle.plan["weight_bytes"]  # type: ignore[index]


@pytest.mark.parametrize("name", ["w8", "w4", "w2", "w8a8", "w4a8", "w2a8"])
@pytest.mark.parametrize("form", FORMS)
def test_a_setting_is_never_larger_than_the_uniform_file(name: str, form: str) -> None:
    setting = parse_setting(name)
    for seed in range(4):
        target = FORMS[form]
        drawn = random_sensitivities(seed, (96, 200, 64))
        table = replace(drawn, quantizer=spec_for(target))
        plan = PlanRequest.for_setting(setting, table, target).allocate(table, target)
        uniform = uniform_plan(shapes_of(table), int(setting.bits), target, table.policy_digest)
        if setting.activation_bits is not None:
            plan, uniform = with_rounded_inputs(plan), with_rounded_inputs(uniform)
        assert plan.weight_bytes <= uniform.weight_bytes


def test_targets_are_of_two_kinds() -> None:
    for target in TARGETS.values():
        assert takes_whole_groups(target.containers) == (target.runtime != "ort")


def test_passes_read_one_layer_at_a_time(tiny_policy: OftPolicy) -> None:
    """A layer's packed constants are handed over before the next layer is read."""
    events: list[str] = []
    graph = float_graph(tiny_policy).clone()
    plan = uniform_plan(layer_shapes(tiny_policy.layers()), 4, RTX4070, tiny_policy.digest)
    for name, value in graph.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or tensor.size < 1000:
            continue

        def read(name: str = name, tensor: ir.TensorProtocol = tensor) -> ir.TensorProtocol:
            events.append(f"read {name}")
            return tensor

        value.const_value = ir.LazyTensor(
            read, dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )

    def store(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        events.append("store")
        return tensor

    lower(graph, plan, RTX4070, store)
    reads = [event for event in events if event != "store"]
    assert len(reads) == len(set(reads))
    longest = max("".join("s" if e == "store" else "r" for e in events).split("s"), key=len)
    # q, k and v.
    assert len(longest) == 3
    assert events[-1] == "store"


@pytest.mark.parametrize(
    ("dtype", "narrow"),
    [(np.float16, ir.DataType.FLOAT16), (ml_dtypes.bfloat16, ir.DataType.BFLOAT16), (None, None)],
)
def test_exact_storage_reads_twice_and_keeps_nothing(dtype: type | None, narrow: object) -> None:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32) * 1e-6
    if dtype is not None:
        weight = weight.astype(dtype).astype(np.float32)
    model = store_exactly(linear_model(weight, None))
    stored = [v.const_value for v in model.graph.initializers.values()]
    assert [t.dtype for t in stored if t is not None] == [narrow or ir.DataType.FLOAT]
    assert all(isinstance(t, ir.LazyTensor) == (narrow is not None) for t in stored)
    assert np.array_equal(stored[0].numpy().astype(np.float32), weight.T)  # type: ignore[union-attr]
