"""The bucketed ONNX of a layer computes what the fake-quantized layer computes."""

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from ort_graphs import (
    LAYER,
    constant,
    conv_model,
    gemm_model,
    linear_model,
    packed_matmuls,
    run_model,
)

from engines.targets import CPU
from qvla_export.graph.float_graph import ExportError
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.quantizer.quantize import as_rows, fake_quantize, spec_for

SPEC = spec_for(CPU)
WIDTHS = (0, 2, 4, 8, 16)


def random_weight(seed: int, *shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check_linear(widths: NDArray[np.int8], inputs: int, bias: bool, folder: Path) -> ir.Model:
    weight = random_weight(0, len(widths), inputs)
    offset = random_weight(1, len(widths)) if bias else None
    x = random_weight(2, 2, 3, inputs)
    model = bucketize(linear_model(weight, offset), {LAYER: widths}, SPEC, CPU)
    expected = x @ fake_quantize(weight, widths, SPEC).T + (0 if offset is None else offset)
    got = run_model(model, x, folder)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, atol=3e-5 * np.sqrt(inputs), rtol=0)
    return model


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    widths=st.lists(st.sampled_from(WIDTHS), min_size=1, max_size=40),
    inputs=st.integers(1, 150),
    bias=st.booleans(),
)
def test_random_mixture_equals_fake_quantization(
    widths: list[int], inputs: int, bias: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_linear(np.array(widths, np.int8), inputs, bias, Path(folder))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("channels", [5, 64])
def test_single_width(bits: int, channels: int, tmp_path: Path) -> None:
    widths = np.full(channels, bits, np.int8)
    model = check_linear(widths, 100, True, tmp_path)
    ops = [node.op_type for node in model.graph]
    assert ops.count("MatMul") == (1 if bits else 0)
    # Two bits fill up to a multiple of four channels, and the Slice drops the rest.
    assert ("Slice" in ops) == (bits == 2 and channels == 5)
    assert "Gather" not in ops


@pytest.mark.parametrize(
    ("widths", "expected", "absent"),
    [
        ([8] * 20 + [4] * 20, {"Concat"}, {"Split", "Gather", "Slice"}),
        ([4] * 20 + [8] * 20, {"Concat"}, {"Split", "Gather", "Slice"}),
        ([4] * 10 + [8] * 20 + [4] * 10, {"Concat", "Split"}, {"Gather", "Slice"}),
        ([4, 8] * 20, {"Concat", "Gather", "Transpose"}, {"Split", "Slice"}),
    ],
)
def test_order_is_restored_by_the_cheapest_operators(
    widths: list[int], expected: set[str], absent: set[str], tmp_path: Path
) -> None:
    model = check_linear(np.array(widths, np.int8), 64, False, tmp_path)
    ops = {node.op_type for node in model.graph}
    assert expected <= ops
    assert not absent & ops


@pytest.mark.parametrize("channels", range(1, 9))
def test_two_bits_with_any_number_of_channels(channels: int, tmp_path: Path) -> None:
    """ONNX Runtime 1.32 computes garbage for INT2 unless channels are a multiple of four."""
    check_linear(np.full(channels, 2, np.int8), 64, False, tmp_path)


def test_runtime_still_needs_the_filling(tmp_path: Path) -> None:
    """Fails when ONNX Runtime mends INT2; then `_COLUMN_MULTIPLE` can go."""
    codes = np.random.default_rng(0).integers(-2, 2, (64, 5)).astype(np.float32)
    weight = np.concatenate([codes, codes[:, :3] * 0], axis=1).T.copy()
    model = bucketize(linear_model(weight, None), {LAYER: np.full(8, 2, np.int8)}, SPEC, CPU)
    narrow = model.clone()
    for name, value in list(narrow.graph.initializers.items()):
        assert value.const_value is not None
        cut = np.ascontiguousarray(value.const_value.numpy()[:, :5])
        value.const_value = ir.Tensor(cut, name=name)
        value.shape = ir.Shape(cut.shape)
    x = random_weight(2, 1, 3, 64)
    full, cut_off = run_model(model, x, tmp_path)[..., :5], run_model(narrow, x, tmp_path)
    assert np.abs(full - cut_off).max() > 0.1


def test_gemm_keeps_its_bias(tmp_path: Path) -> None:
    weight, bias, x = random_weight(0, 12, 70), random_weight(1, 12), random_weight(2, 4, 70)
    widths = np.array([0, 2, 4, 8, 16, 0] * 2, np.int8)
    model = bucketize(gemm_model(weight, bias), {LAYER: widths}, SPEC, CPU)
    expected = x @ fake_quantize(weight, widths, SPEC).T + bias
    np.testing.assert_allclose(run_model(model, x, tmp_path), expected, atol=1e-4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("uniform", [None, 0, 4])
def test_patch_embedding(bias: bool, uniform: int | None, tmp_path: Path) -> None:
    weight = random_weight(0, 10, 3, 7, 7)  # 147 inputs: no multiple of the block
    offset = random_weight(1, 10) if bias else None
    widths = np.array([0, 2, 4, 8, 16] * 2 if uniform is None else [uniform] * 10, np.int8)
    x = random_weight(2, 2, 3, 21, 21)
    rounded = fake_quantize(as_rows(weight), widths, SPEC).reshape(weight.shape)
    expected = run_model(conv_model(rounded, offset, 21), x, tmp_path)
    model = bucketize(conv_model(weight, offset, 21), {LAYER: widths}, SPEC, CPU)
    assert not any(node.op_type == "Conv" for node in model.graph)
    np.testing.assert_allclose(run_model(model, x, tmp_path), expected, atol=2e-4)


def test_every_packed_width_runs_packed(tmp_path: Path) -> None:
    widths = np.array([2, 4, 8, 16, 0] * 13, np.int8)
    check_linear(widths, 128, True, tmp_path)
    packed = packed_matmuls(tmp_path / "model.onnx", tmp_path / "optimized.onnx")
    assert packed == {2: 1, 4: 1, 8: 1}


def test_float_graph_is_left_alone() -> None:
    model = linear_model(random_weight(0, 8, 16), None)
    bucketize(model, {LAYER: np.full(8, 4, np.int8)}, SPEC, CPU)
    assert [node.op_type for node in model.graph] == ["MatMul"]


@pytest.mark.parametrize(
    ("name", "channels", "message"),
    [("tower.other", 8, "tower.other"), (LAYER, 7, "7 widths to layer tower.layer")],
)
def test_plan_of_another_policy_is_refused(name: str, channels: int, message: str) -> None:
    model = linear_model(random_weight(0, 8, 16), None)
    with pytest.raises(ExportError, match=message):
        bucketize(model, {name: np.full(channels, 4, np.int8)}, SPEC, CPU)


@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        (7, {"pads": [3, 3, 3, 3], "strides": [2, 2]}),
        (3, {"pads": [1, 1, 1, 1], "strides": [1, 1]}),
        (3, {"pads": [0, 2, 1, 0], "strides": [2, 1]}),
        (1, {"strides": [2, 2]}),
        (4, {"strides": [3, 3]}),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_any_convolution(
    kernel: int, attributes: dict[str, list[int]], bias: bool, tmp_path: Path
) -> None:
    weight = random_weight(0, 10, 3, kernel, kernel)
    offset = random_weight(1, 10) if bias else None
    widths = np.array([0, 2, 4, 8, 16] * 2, np.int8)
    x = random_weight(2, 2, 3, 21, 21)
    rounded = fake_quantize(as_rows(weight), widths, SPEC).reshape(weight.shape)
    expected = run_model(conv_model(rounded, offset, 21, **attributes), x, tmp_path)
    model = bucketize(conv_model(weight, offset, 21, **attributes), {LAYER: widths}, SPEC, CPU)
    assert not any(node.op_type == "Conv" for node in model.graph)
    np.testing.assert_allclose(run_model(model, x, tmp_path), expected, atol=2e-4)


def test_a_convolution_with_holes_is_refused() -> None:
    model = conv_model(random_weight(0, 4, 3, 7, 7), None, 21, dilations=[2, 2])
    with pytest.raises(ExportError, match="one group, no dilation"):
        bucketize(model, {LAYER: np.full(4, 4, np.int8)}, SPEC, CPU)


def test_what_cannot_reach_the_output_leaves(tmp_path: Path) -> None:
    """As a tower's last block: its nodes, its weight and what only it reads go; numbers stay."""
    weight, x = random_weight(0, 12, 30), random_weight(1, 2, 3, 30)
    model = linear_model(weight, None)
    dead = ir.tape.Tape()
    node = next(n for n in model.graph if n.op_type == "MatMul")
    scaled = dead.op("Mul", [node.outputs[0], constant(dead, "dead.scale", random_weight(2, 12))])
    dead.op("MatMul", [scaled, constant(dead, "dead.weight", random_weight(3, 12, 50))])
    for value in dead.initializers:
        model.graph.register_initializer(value)
    model.graph.extend(dead.nodes)
    widths = np.array([8, 4, 2] * 4, np.int8)
    lean = bucketize(model, {LAYER: widths}, SPEC, CPU)
    assert not [name for name in lean.graph.initializers if name.startswith("dead")]
    assert "Mul" not in {n.op_type for n in lean.graph}
    assert [name for name in model.graph.initializers if name.startswith("dead")]
    expected = x @ fake_quantize(weight, widths, SPEC).T
    np.testing.assert_allclose(run_model(lean, x, tmp_path), expected, atol=3e-4)
