"""TensorRT gets codes of two levels as the int8 numbers they stand for: plain ONNX, one product."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graph_checks import require_clean
from numpy.typing import NDArray
from ort_graphs import LAYER, linear_model
from rtx_parser import builds
from tiny_bundles import mixed_plan

from engines.targets import RTX4070, find_target
from qvla_export.graph.export import export_bundle
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.compute_type import to_compute_type
from qvla_export.graph.passes.integer_products import keep_integer_products
from qvla_export.graph.passes.quantize_activations import quantize_activations
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import quantize_channels, spec_for
from qvla_export.shared.observation import Observation

LEVELED = RTX4070.with_two_level_scales()
SPEC = spec_for(LEVELED)


def expanded_layer(weight: NDArray[np.float32], widths: NDArray[np.int8]) -> ir.Model:
    model = linear_model(weight, None)
    model = quantize_activations(model, ActivationRanges(8, "max", {LAYER: 2.5}), LEVELED)
    model = bucketize(model, {LAYER: widths}, SPEC, LEVELED, rounded_inputs=True)
    model = to_compute_type(keep_integer_products(model), LEVELED)
    model.graph.opset_imports[""], model.ir_version = LEVELED.opset, LEVELED.ir_version
    return model


@pytest.mark.parametrize("inputs", [100, 256])
@pytest.mark.parametrize(
    "shares", [{4: 40}, {8: 24, 4: 12, 2: 7}, {8: 24, 4: 12, 2: 8, 0: 20}, {16: 8, 4: 24, 2: 8}]
)
def test_one_product_holds_the_integers_of_the_packed_codes(
    shares: dict[int, int], inputs: int, tmp_path: Path
) -> None:
    generator = np.random.default_rng(inputs)
    widths = np.repeat(list(shares), list(shares.values())).astype(np.int8)
    generator.shuffle(widths)
    weight = generator.standard_normal((len(widths), inputs)).astype(np.float32)
    model = expanded_layer(weight, widths)
    nodes = list(model.graph)
    weights = [node.inputs[1] for node in nodes if node.op_type == "MatMul"]
    (unpacked,) = [w.producer() for w in weights if w is not None and w.producer() is not None]
    assert len(weights) == 1 + (16 in shares)
    moving = {node.op_type for node in nodes} & {"Concat", "Gather", "Pad", "Split"}
    assert bool(moving) == bool({0, 16} & set(shares))  # what is pruned, and floats, have places
    assert unpacked is not None and unpacked.attributes.get_int("axis") == 1
    codes, scales = (value.const_value for value in unpacked.inputs[:2] if value is not None)
    assert codes is not None and scales is not None
    integers = np.flatnonzero(np.isin(widths, [2, 4, 8]))
    assert codes.numpy().dtype == np.int8 and scales.numpy().dtype == np.float16
    for column, channel in enumerate(integers.tolist()):
        one = quantize_channels(weight[[channel]], int(widths[channel]), SPEC)
        np.testing.assert_array_equal(codes.numpy()[:, column], one.expanded()[0])
        assert scales.numpy()[column] == one.scales[0, 0]
    ir.save(model, tmp_path / "layer.onnx")
    assert builds(tmp_path / "layer.onnx", [{"x": 3}])


def rounded_plan(policy: OftPolicy) -> BitPlan:
    plan = mixed_plan(policy)
    return replace(
        plan,
        target=LEVELED.name,
        containers=dict(LEVELED.containers),
        quantizer=SPEC,
        activations=ActivationRanges(8, "max", dict.fromkeys(plan.widths, 2.0)),
    )


@pytest.mark.slow
def test_every_version_takes_a_policys_parts(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[[int], list[Observation]],
    tmp_path: Path,
) -> None:
    plan = rounded_plan(tiny_policy)
    bundle = export_bundle(tiny_policy, plan, RTX4070, tiny_observations(1), tmp_path / "bundle")
    for name in ("rtx4070", "orin-jp7", "orin-jp6"):
        require_clean(bundle, find_target(name))
    for part in bundle.parts:
        path = bundle.model_path(part)
        stored = {v.dtype for v in ir.load(path).graph.initializers.values()}
        assert ir.DataType.INT4 not in stored
        prompt = {spec.name: 8 for spec in part.inputs}
        assert builds(path, [prompt]), part.name
