"""Graphs for TensorRT targets: strongly typed, close to float32, built by the real builder."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from ort_graphs import LAYER, constant, float_options, linear_model, model_of
from tiny_bundles import float_graph

from engines.targets import CPU, RTX4070
from qvla_export.graph.external_data import ExternalData
from qvla_export.graph.float_graph import ExportError, layer_nodes
from qvla_export.graph.graph_figures import measure_graph
from qvla_export.graph.lowering import lower
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.compute_type import to_compute_type
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.plan_bytes import PackedForm, stored_bytes
from qvla_export.quantizer.quantize import fake_quantize, spec_for
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.observation import Observation
from qvla_export.shared.target import Target, UnsupportedOnTarget

SPEC = spec_for(RTX4070)
# The same containers and passes, in float32: what float16 adds to is measured against it.
FLOAT32 = replace(RTX4070, compute="float32")
MIXTURE = [0, 2, 4, 8, 16]
# Of the normalized action; measured 1.5e-3 (float), 1.0e-3 (8 bits), 1.2e-3 (4), 1.0e-3 (mixed).
DRIFT = 4e-3
Feeds = dict[str, NDArray[np.generic]]


def random(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def run(model: ir.Model, feeds: Feeds, path: Path) -> NDArray[np.float32]:
    """Check a graph's types strictly and run it as it is."""
    (output,) = model.graph.outputs
    if output.shape is None:
        output.shape = ir.Shape([None, None, None])
    ir.save(model, path)
    onnx.checker.check_model(str(path), full_check=True)
    options = float_options()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, feeds)[0]
    return result


def builds(path: Path) -> int:
    """Return the bytes of the SM89 engine that TensorRT-RTX builds; no GPU is needed."""
    trt = pytest.importorskip("tensorrt_rtx")
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    assert parser.parse_from_file(str(path)), str(parser.get_error(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        value = network.get_input(i)
        if -1 in value.shape:
            sizes = [[n if d == -1 else d for d in value.shape] for n in (2, 20, 64)]
            profile.set_shape(value.name, *sizes)
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None
    return int(engine.nbytes)


@pytest.mark.parametrize("channels", [1, 7, 64])
@pytest.mark.parametrize("inputs", [1, 100, 128])
@pytest.mark.parametrize("uniform", [None, *MIXTURE])
def test_layer_computes_its_fake_quantization(
    channels: int, inputs: int, uniform: int | None, tmp_path: Path
) -> None:
    choices = MIXTURE if uniform is None else [uniform]
    widths = np.random.default_rng(4).choice(choices, channels).astype(np.int8)
    weight, bias, x = random(0, channels, inputs), random(1, channels), random(2, 2, 3, inputs)
    model = bucketize(linear_model(weight, bias), {LAYER: widths}, SPEC, RTX4070)
    model = to_compute_type(model, RTX4070)
    model.graph.opset_imports[""], model.ir_version = RTX4070.opset, RTX4070.ir_version
    expected = x @ fake_quantize(weight, widths, SPEC).T + bias
    got = run(model, {"x": x}, tmp_path / "layer.onnx")
    assert got.dtype == np.float32
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=4e-3 * np.sqrt(inputs))


def test_weights_reach_their_product_as_tensorrt_wants(tmp_path: Path) -> None:
    widths = np.array(MIXTURE * 8, np.int8)
    model = bucketize(linear_model(random(0, 40, 100), None), {LAYER: widths}, SPEC, RTX4070)
    model = to_compute_type(model, RTX4070)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert len(products) == 4
    for product in products:
        weight = product.inputs[1]
        assert weight is not None
        unpack = weight.producer()
        if unpack is None:
            assert weight.dtype == ir.DataType.FLOAT16
            continue
        codes, scale = unpack.inputs[:2]
        assert unpack.op_type == "DequantizeLinear"
        assert codes is not None and codes.is_initializer() and codes.shape is not None
        assert scale is not None and scale.is_initializer() and scale.dtype == ir.DataType.FLOAT16
        if codes.dtype == ir.DataType.INT4:
            assert codes.shape.numpy()[0] == 128
            assert unpack.attributes.get_int("axis") == 0
            assert unpack.attributes.get_int("block_size") == 128
        else:
            assert codes.dtype == ir.DataType.INT8 and codes.shape.numpy()[0] == 100
            assert unpack.attributes.get_int("axis") == 1


def norm_model(scale: float) -> ir.Model:
    """RMSNorm and softmax of numbers whose squares float16 cannot hold."""
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, ("B", "M", 64))
    small = tape.op("Mul", [x, constant(tape, "scale", np.float32([scale]))])
    square = tape.op("Pow", [small, constant(tape, "two", np.array(2.0, np.float32))])
    axes = constant(tape, "axes", np.array([-1]))
    mean = tape.op("ReduceMean", [square, axes], {"keepdims": 1})
    root = tape.op("Sqrt", [tape.op("Add", [mean, constant(tape, "e", np.float32([1e-6]))])])
    normed = tape.op("Mul", [small, tape.op("Reciprocal", [root])])
    weighted = tape.op("Mul", [constant(tape, "w", random(1, 64)), normed])
    y = tape.op("MatMul", [weighted, constant(tape, "m", random(2, 64, 64))])
    return model_of(tape, x, tape.op("Softmax", [y], {"axis": -1}))


def test_norms_and_softmax_keep_their_range(tmp_path: Path) -> None:
    model = to_compute_type(norm_model(1000.0), RTX4070)
    types = {node.op_type: node.outputs[0].dtype for node in model.graph}
    assert types["MatMul"] == ir.DataType.FLOAT16
    assert {types[op] for op in ("Pow", "Sqrt", "Reciprocal", "Softmax")} == {ir.DataType.FLOAT}
    # To float16 before the product, back behind it.
    assert Counter(node.op_type for node in model.graph)["Cast"] == 2
    x = random(0, 2, 3, 64)
    got = run(model, {"x": x}, tmp_path / "half.onnx")
    expected = run(norm_model(1000.0), {"x": x}, tmp_path / "float.onnx")
    np.testing.assert_allclose(got, expected, atol=0.02)


def test_constant_beyond_float16_is_refused_by_name(tmp_path: Path) -> None:
    weight = random(0, 8, 16)
    weight[3, 5] = -7e4
    model = to_compute_type(linear_model(weight, None), RTX4070)
    with (
        ExternalData(tmp_path / "model.onnx") as data,
        pytest.raises(ExportError, match=r"constant w has 1 values beyond float16.* 70000"),
    ):
        data.save(model)


def test_float32_target_leaves_the_graph() -> None:
    model = linear_model(random(0, 8, 16), None)
    assert to_compute_type(model, CPU) is model


@pytest.fixture(scope="module")
def feeds(tiny_policy: OftPolicy, tiny_observations: Callable[..., list[Observation]]) -> Feeds:
    return dict(tiny_policy.processor.feeds(tiny_observations(1)[0]))


def plan_of(policy: OftPolicy, setting: str) -> BitPlan | None:
    shapes = layer_shapes(policy.layers())
    if setting == "float":
        return None
    if setting != "mixed":
        return uniform_plan(shapes, int(setting), RTX4070, policy.digest)
    generator = np.random.default_rng(0)
    widths = {
        name: generator.choice(MIXTURE, n, p=[0.05, 0.2, 0.5, 0.2, 0.05]).astype(np.int8)
        for name, (n, _) in shapes.items()
    }
    return replace(uniform_plan(shapes, 4, RTX4070, policy.digest), widths=widths)


def traced(policy: OftPolicy) -> ir.Model:
    graph = float_graph(policy).clone()
    graph.graph.opset_imports[""], graph.ir_version = RTX4070.opset, RTX4070.ir_version
    return graph


@pytest.mark.parametrize("setting", ["float", "8", "4", "mixed"])
def test_whole_policy_is_close_to_float32_and_builds(
    setting: str, tiny_policy: OftPolicy, feeds: Feeds, tmp_path: Path
) -> None:
    plan = plan_of(tiny_policy, setting)
    graph = traced(tiny_policy)
    model, parts = lower(graph, plan, RTX4070)
    got = run(model, feeds, tmp_path / "half.onnx")
    single = None if plan is None else replace(plan, target=FLOAT32.name)
    expected = run(lower(graph, single, FLOAT32)[0], feeds, tmp_path / "float.onnx")
    assert got.dtype == np.float32
    assert np.abs(got - expected).max() < DRIFT
    assert {value.dtype for value in model.graph.inputs} <= {
        ir.DataType.FLOAT,
        ir.DataType.INT64,
    }
    if plan is not None:
        planned = sum(n for part, n in parts.items() if part not in ("biases", "rest"))
        packed = PackedForm(plan.containers, compensated=True)
        assert planned == stored_bytes(plan.widths, plan.weights_per_channel, packed)
        # Biases are counted in 32 bits.
        assert planned + 2 * parts["biases"] == plan.weight_bytes
    assert builds(tmp_path / "half.onnx") > sum(parts.values())


def test_no_value_is_cast_twice(tiny_policy: OftPolicy) -> None:
    model, _ = lower(traced(tiny_policy), plan_of(tiny_policy, "mixed"), RTX4070)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len({(node.inputs[0], node.attributes.get_int("to")) for node in casts}) == len(casts)
    for node in casts:
        source = node.inputs[0]
        assert source is not None and not source.is_initializer()
        made_by = source.producer()
        assert made_by is None or made_by.op_type != "Cast"


def test_no_gather_behind_mlp_producers_and_one_product_a_width(tiny_policy: OftPolicy) -> None:
    plan = plan_of(tiny_policy, "mixed")
    assert plan is not None
    model, _ = lower(traced(tiny_policy), plan, RTX4070)
    figures = measure_graph(model, plan)
    assert figures.order_gathers > figures.mlp_gathers == 0
    products = Counter(
        node.metadata_props["qvla.layer.part"]
        for node in model.graph
        if node.op_type == "MatMul" and "qvla.layer.part" in node.metadata_props
    )
    assert max(products.values()) <= 4
    assert "+" in max(products, key=len)


@pytest.mark.parametrize(
    "target",
    [RTX4070, CPU, RTX4070.with_two_level_scales()],
    ids=["rtx4070", "cpu", "rtx4070, two-level"],
)
@pytest.mark.parametrize("setting", ["mixed", "4"])
def test_figures_count_the_products_of_the_graph(
    setting: str, target: Target, tiny_policy: OftPolicy
) -> None:
    """What fills groups and columns up is multiplied too."""
    plan = plan_of(tiny_policy, setting)
    assert plan is not None
    plan = replace(
        plan, target=target.name, containers=dict(target.containers), quantizer=spec_for(target)
    )
    model, _ = lower(traced(tiny_policy), plan, target)
    figures = measure_graph(model, plan)
    done = 0
    for node in model.graph:
        if node.op_type == "MatMul" and "qvla.layer.part" in node.metadata_props:
            stored = node.inputs[1]
            while stored is not None and not stored.is_initializer():
                maker = stored.producer()
                assert maker is not None
                stored = maker.inputs[0]
            assert stored is not None and stored.shape is not None
            done += int(np.prod(stored.shape.numpy()))
    assert figures.multiplications - figures.multiplications_removed == done


def test_float_bundle_names_its_layers(tiny_policy: OftPolicy) -> None:
    graph = traced(tiny_policy)
    model, parts = lower(graph, None, RTX4070)
    shapes = layer_shapes(tiny_policy.layers())
    assert parts["float"] == sum(2 * n * k for n, k in shapes.values())
    assert set(layer_nodes(model)) == set(shapes)


def test_plans_that_do_not_fit_are_refused(tiny_policy: OftPolicy) -> None:
    plan = plan_of(tiny_policy, "4")
    assert plan is not None
    graph = traced(tiny_policy)
    with pytest.raises(UnsupportedOnTarget, match="plan is for target 'rtx4070'"):
        lower(graph, plan, CPU)
    with pytest.raises(UnsupportedOnTarget, match="4 bits as Container"):
        lower(graph, replace(plan, target="cpu"), CPU)
    with pytest.raises(UnsupportedOnTarget, match="one for 64 inputs"):
        lower(graph, replace(plan, quantizer=spec_for(CPU)), RTX4070)
    ranges = ActivationRanges(4, "max", dict.fromkeys(plan.widths, 1.0))
    with pytest.raises(UnsupportedOnTarget, match="4-bit activations"):
        lower(graph, replace(plan, activations=ranges), RTX4070)
