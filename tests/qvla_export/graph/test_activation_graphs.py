"""The nodes of rounded activations, and the kernels ONNX Runtime makes of them."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from ort_graphs import (
    LAYER,
    constant,
    conv_model,
    float_options,
    gemm_model,
    linear_model,
    model_of,
    run_model,
)
from torch import nn

from engines.ort import saturates
from engines.targets import CPU, RTX4070
from qvla_export.graph.float_graph import LAYER_KEY, ExportError
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.integer_products import keep_integer_products
from qvla_export.graph.passes.merge import merge_parallel
from qvla_export.graph.passes.quantize_activations import quantize_activations
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.quantize import as_rows, fake_quantize, spec_for
from qvla_export.shared.target import UnsupportedOnTarget

SPEC = spec_for(CPU)


def ranges_of(limit: float, *layers: str) -> ActivationRanges:
    return ActivationRanges(8, "max", dict.fromkeys(layers, limit))


def rounded(values: NDArray[np.float32], scale: np.float32) -> NDArray[np.float32]:
    codes: NDArray[np.float32] = np.clip(np.rint(values / scale), -128, 127).astype(np.float32)
    return codes * scale


def kernels(model: ir.Model, folder: Path) -> Counter[str]:
    """Return the operators that ONNX Runtime runs."""
    ir.save(model, folder / "kernels.onnx")
    options = float_options()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        str(folder / "kernels.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return Counter(node.op_type for node in ir.load(folder / "optimized.onnx").graph)


def rounded_layer(model: ir.Model, widths: NDArray[np.int8], limit: float) -> ir.Model:
    activated = quantize_activations(model, ranges_of(limit, LAYER), CPU)
    return keep_integer_products(bucketize(activated, {LAYER: widths}, SPEC, CPU))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("shares", "integer", "packed", "floats"),
    [({8: 64}, 1, 0, 0), ({4: 64}, 0, 1, 0), ({16: 16, 8: 24, 4: 12, 2: 8, 0: 4}, 1, 2, 1)],
)
def test_eight_bit_buckets_multiply_integers(
    shares: dict[int, int], integer: int, packed: int, floats: int, bias: bool, tmp_path: Path
) -> None:
    generator = np.random.default_rng(1)
    widths = np.repeat(list(shares), list(shares.values())).astype(np.int8)
    generator.shuffle(widths)
    weight = generator.standard_normal((64, 128)).astype(np.float32)
    offset = generator.standard_normal(64).astype(np.float32) if bias else None
    x = generator.standard_normal((1, 30, 128)).astype(np.float32)
    model = rounded_layer(linear_model(weight, offset), widths, 2.5)
    used = kernels(model, tmp_path)
    assert used["MatMulIntegerToFloat"] == integer
    assert used["MatMulNBits"] == packed
    assert used["MatMul"] == floats and not used["Gemm"]
    steps = rounded(x, np.float32(2.5 / 127))
    expected = steps @ fake_quantize(weight, widths, SPEC).T + (0 if offset is None else offset)
    np.testing.assert_allclose(run_model(model, x, tmp_path), expected, rtol=0, atol=1e-4)


def by_tokens(*layers: str) -> ActivationRanges:
    return ActivationRanges(8, "token", dict.fromkeys(layers, 1.0), frozenset(layers))


def rounded_by_tokens(values: NDArray[np.float32]) -> NDArray[np.float32]:
    sizes = np.maximum(np.abs(values).max(axis=-1, keepdims=True), np.float32(1e-6))
    result: NDArray[np.float32] = rounded(values / sizes, np.float32(1 / 127)) * sizes
    return result


@pytest.mark.parametrize("form", ["product", "product and bias", "gemm"])
@pytest.mark.parametrize("shares", [{8: 64}, {16: 16, 8: 24, 4: 12, 2: 8, 0: 4}])
def test_a_token_has_the_range_of_its_largest_number(
    shares: dict[int, int], form: str, tmp_path: Path
) -> None:
    """The product stays one of integers; tokens of zeros give the bias."""
    generator = np.random.default_rng(1)
    widths = np.repeat(list(shares), list(shares.values())).astype(np.int8)
    generator.shuffle(widths)
    weight = generator.standard_normal((64, 128)).astype(np.float32)
    offset = generator.standard_normal(64).astype(np.float32)
    sizes = 10.0 ** generator.integers(-4, 4, (30, 1))
    x = (generator.standard_normal((30, 128)) * sizes).astype(np.float32)
    x[3] = 0
    model = gemm_model(weight, offset)
    if form != "gemm":
        x = x[None]
        model = linear_model(weight, offset if form == "product and bias" else None)
    activated = quantize_activations(model, by_tokens(LAYER), CPU)
    final = keep_integer_products(bucketize(activated, {LAYER: widths}, SPEC, CPU))
    assert kernels(final, tmp_path)["MatMulIntegerToFloat"] == 1
    expected = rounded_by_tokens(x).astype(np.float64) @ fake_quantize(weight, widths, SPEC).T
    got = run_model(final, x, tmp_path) - (0 if form == "product" else offset)
    # Of the bias a token of small numbers is a small part.
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6 + 2e-5 * np.abs(expected).max())
    small = np.flatnonzero(sizes[:, 0] < 1)
    if form == "product":
        error = np.abs(got - expected)[0, small].max(axis=-1)
        assert (
            error <= 1e-5 * np.abs(x[0, small]).max(axis=-1) * np.abs(weight).sum(1).max()
        ).all()


def test_layers_of_one_input_share_the_ranges_of_tokens(tmp_path: Path) -> None:
    model = quantize_activations(parallel_layers(), by_tokens("t.a", "t.b"), CPU)
    widths = {name: np.full(64, 8, np.int8) for name in ("t.a", "t.b")}
    merged, widths = merge_parallel(model, widths, RTX4070.containers)
    final = keep_integer_products(bucketize(merged, widths, SPEC, CPU))
    used = kernels(final, tmp_path)
    assert used["ReduceMax"] == used["QuantizeLinear"] == used["MatMulIntegerToFloat"] == 1
    x = np.random.default_rng(0).standard_normal((1, 5, 64)).astype(np.float32)
    np.testing.assert_allclose(
        run_model(final, x, tmp_path), 3 * rounded_by_tokens(x), rtol=1e-4, atol=1e-5
    )


def test_ranges_of_tokens_are_refused_where_a_tensor_has_one_scale() -> None:
    with pytest.raises(
        UnsupportedOnTarget, match=r"has no ranges of tokens: .* another --activations-method"
    ):
        quantize_activations(parallel_layers(), by_tokens("t.a", "t.b"), RTX4070)


@pytest.mark.parametrize("reshaped", [True, False])
def test_a_product_that_is_rounded_next_runs_where_integers_are_kept_exact(
    reshaped: bool, tmp_path: Path
) -> None:
    """ONNX Runtime 1.32 refuses its own graph where such a weight states no zero points."""
    generator = np.random.default_rng(3)
    weights = generator.standard_normal((2, 64, 64)).astype(np.float32)
    x = generator.standard_normal((1, 30, 64)).astype(np.float32)
    tape = ir.tape.Tape()
    value = start = ir.val("x", ir.DataType.FLOAT, (1, 30, 64))
    names = ("t.a", "t.b")
    for name, weight in zip(names, weights, strict=True):
        product = constant(tape, name, weight.T)
        value = tape.op("MatMul", [value, product], metadata_props={LAYER_KEY: name})
        if reshaped:
            shape = np.array([1, 1, 30, 64] if name == "t.a" else [1, 30, 64], np.int64)
            value = tape.op("Reshape", [value, constant(tape, f"{name}.shape", shape)])
    activated = quantize_activations(
        model_of(tape, start, value), ActivationRanges(8, "max", {"t.a": 2.5, "t.b": 25.0}), CPU
    )
    widths = {name: np.full(64, 8, np.int8) for name in names}
    model = keep_integer_products(bucketize(activated, widths, SPEC, CPU, rounded_inputs=True))
    first, second = (fake_quantize(weight, widths["t.a"], SPEC) for weight in weights)
    hidden = rounded(x, np.float32(2.5 / 127)) @ first.T
    expected = rounded(hidden, np.float32(25 / 127)) @ second.T
    got = run_model(model, x, tmp_path).reshape(expected.shape)
    # A sum that lies between two steps may be rounded to either.
    assert np.mean(np.abs(got - expected)) < 1e-2


@pytest.mark.parametrize("bits", [8, 4])
def test_patch_embeddings_multiply_integers(bits: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    weight = generator.standard_normal((8, 3, 8, 8)).astype(np.float32)
    offset = generator.standard_normal(8).astype(np.float32)
    widths = np.full(8, bits, np.int8)
    x = generator.standard_normal((2, 3, 24, 24)).astype(np.float32)
    model = rounded_layer(conv_model(weight, offset, 24), widths, 2.5)
    used = kernels(model, tmp_path)
    assert used["MatMulIntegerToFloat" if bits == 8 else "MatMulNBits"] == 1
    kernel = fake_quantize(as_rows(weight), widths, SPEC).reshape(weight.shape)
    steps = torch.from_numpy(rounded(x, np.float32(2.5 / 127)))
    expected = nn.functional.conv2d(steps, torch.from_numpy(kernel), torch.from_numpy(offset), 8)
    np.testing.assert_allclose(run_model(model, x, tmp_path), expected, rtol=0, atol=2e-4)


def parallel_layers() -> ir.Model:
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, (1, "M", 64))
    weights = [np.eye(64, dtype=np.float32) * k for k in (1, 2)]
    products = [
        tape.op("MatMul", [x, constant(tape, n, w)], metadata_props={LAYER_KEY: f"t.{n}"})
        for n, w in zip("ab", weights, strict=True)
    ]
    y = tape.op("Add", products)
    y.name, y.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(
        [x], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 25}
    )
    return ir.Model(graph, ir_version=13)


def test_layers_of_one_input_are_rounded_once_and_still_merge(tmp_path: Path) -> None:
    model = quantize_activations(parallel_layers(), ranges_of(3.0, "t.a", "t.b"), CPU)
    widths = {name: np.full(64, 8, np.int8) for name in ("t.a", "t.b")}
    merged, widths = merge_parallel(model, widths, RTX4070.containers)
    used = kernels(keep_integer_products(bucketize(merged, widths, SPEC, CPU)), tmp_path)
    assert used["QuantizeLinear"] == used["MatMulIntegerToFloat"] == 1
    uneven = ActivationRanges(8, "max", {"t.a": 3.0, "t.b": 2.0})
    with pytest.raises(ExportError, match="must share its range"):
        quantize_activations(parallel_layers(), uneven, CPU)
    with pytest.raises(ExportError, match="not in the graph"):
        quantize_activations(parallel_layers(), ranges_of(1.0, "t.a", "t.c"), CPU)


def test_tensorrt_gets_signed_codes_around_zero() -> None:
    ranges = ranges_of(3.0, "t.a", "t.b")
    for target, zero in ((CPU, np.uint8(128)), (RTX4070, np.int8(0))):
        graph = quantize_activations(parallel_layers(), ranges, target).graph
        (value,) = [v for n, v in graph.initializers.items() if n.endswith(".input_zero")]
        assert value.const_value is not None
        assert value.const_value.numpy() == zero
        assert value.const_value.numpy().dtype == zero.dtype


def test_what_no_target_multiplies_is_refused() -> None:
    floats = replace(CPU, activations=("none",))
    with pytest.raises(UnsupportedOnTarget, match="no 8-bit activations"):
        quantize_activations(parallel_layers(), ranges_of(1.0, "t.a"), floats)
    with pytest.raises(UnsupportedOnTarget, match="simulated in torch only"):
        quantize_activations(parallel_layers(), ActivationRanges(4, "max", {"t.a": 1.0}), CPU)


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 fma\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 avx_vnni\n", False),
        ("flags\t\t: avx512_vnni\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", False),
        ("", False),
    ],
)
def test_exact_integers_are_for_cpus_whose_products_saturate(cpuinfo: str, expected: bool) -> None:
    assert saturates(cpuinfo) == expected
