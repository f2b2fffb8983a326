"""Layers of rounded inputs become one product of integers, the very ones of the packed codes."""

from collections import Counter
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from numpy.typing import NDArray
from ort_graphs import LAYER, float_options, linear_model, run_model

from engines.ort import keep_integers_exact
from engines.targets import CPU
from qvla_export.graph.passes.bucketize import bucketize
from qvla_export.graph.passes.integer_products import keep_integer_products
from qvla_export.graph.passes.quantize_activations import quantize_activations
from qvla_export.quantizer.activations import ActivationRanges
from qvla_export.quantizer.packed_storage import bucket_bytes
from qvla_export.quantizer.quantize import fake_quantize, quantize_channels, spec_for

LEVELED = CPU.with_two_level_scales()
SPEC = spec_for(LEVELED)
LIMIT = 2.5


def expanded_layer(weight: NDArray[np.float32], widths: NDArray[np.int8]) -> ir.Model:
    ranges = ActivationRanges(8, "max", {LAYER: LIMIT})
    model = quantize_activations(linear_model(weight, None), ranges, LEVELED)
    expanded = bucketize(model, {LAYER: widths}, SPEC, LEVELED, rounded_inputs=True)
    return keep_integer_products(expanded)


def kernels(model: ir.Model, folder: Path) -> Counter[str]:
    """Return the operators that ONNX Runtime runs."""
    ir.save(model, folder / "kernels.onnx")
    options = float_options()
    keep_integers_exact(options)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(
        str(folder / "kernels.onnx"), options, providers=["CPUExecutionProvider"]
    )
    return Counter(node.op_type for node in ir.load(folder / "optimized.onnx").graph)


def packed_product(
    codes: NDArray[np.int64], weight: NDArray[np.float32], widths: NDArray[np.int8]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Multiply input codes by packed ones, each sum of a group times its multiplier.

    Returns:
        Integers [rows, channels], and the scales of the channels.
    """
    sums = np.zeros((len(codes), len(widths)), np.int64)
    scales = np.zeros(len(widths), np.float32)
    for bits in set(widths.tolist()) - {0}:
        chosen = widths == bits
        made = quantize_channels(weight[chosen], bits, SPEC)
        size = made.group_size or weight.shape[1]
        starts = range(0, weight.shape[1], size)
        of_groups = [
            codes[:, s : s + size] @ made.codes[:, s : s + size].T.astype(np.int64) for s in starts
        ]
        factors = np.ones((chosen.sum(), 1)) if made.multipliers is None else made.multipliers
        pairs = zip(of_groups, factors.T.astype(np.int64), strict=True)
        sums[:, chosen] = sum(group * factor for group, factor in pairs)
        scales[chosen] = made.scales[:, 0]
    return sums, scales


@pytest.mark.parametrize("inputs", [64, 150, 256])
@pytest.mark.parametrize(
    "shares", [{4: 40}, {2: 37}, {8: 24, 4: 12, 2: 7}, {8: 24, 4: 12, 2: 7, 0: 5}, {2: 3, 0: 9}]
)
def test_integers_are_those_of_the_packed_codes(
    shares: dict[int, int], inputs: int, tmp_path: Path
) -> None:
    generator = np.random.default_rng(inputs)
    widths = np.repeat(list(shares), list(shares.values())).astype(np.int8)
    generator.shuffle(widths)
    weight = generator.standard_normal((len(widths), inputs)).astype(np.float32)
    x = generator.standard_normal((1, 30, inputs)).astype(np.float32)
    model = expanded_layer(weight, widths)
    got = run_model(model, x, tmp_path)[0]
    step = np.float32(LIMIT / 127)
    codes = np.clip(np.rint(x[0] / step), -128, 127).astype(np.int64)
    sums, scales = packed_product(codes, weight, widths)
    kept = widths > 0
    # One float scale behind each sum: what comes back from it is the integer, to the last bit.
    found = got[:, kept].astype(np.float64) / (np.float64(step) * scales[kept])
    np.testing.assert_array_equal(np.rint(found), sums[:, kept])
    assert np.abs(found - sums[:, kept]).max() < 0.02
    assert not got[:, ~kept].any()
    used = kernels(model, tmp_path)
    assert used["MatMulIntegerToFloat"] == 1 and not used["MatMulNBits"] and not used["MatMul"]
    assert not used["DequantizeLinear"] and not used["Concat"]
    assert used["Gather"] == (0 in shares)


def test_codes_of_one_group_need_no_multipliers(tmp_path: Path) -> None:
    generator = np.random.default_rng(7)
    widths = np.repeat([8, 4, 2], [8, 9, 7]).astype(np.int8)
    weight = generator.standard_normal((24, 48)).astype(np.float32)
    x = generator.standard_normal((1, 5, 48)).astype(np.float32)
    ranges, how = ActivationRanges(8, "max", {LAYER: LIMIT}), spec_for(CPU)
    for some in (widths, widths[8:17]):
        model = quantize_activations(linear_model(weight[: len(some)], None), ranges, CPU)
        model = bucketize(model, {LAYER: some}, how, CPU, rounded_inputs=True)
        model = keep_integer_products(model)
        step = np.float32(LIMIT / 127)
        rounded = np.clip(np.rint(x / step), -128, 127) * step
        expected = rounded @ fake_quantize(weight[: len(some)], some, how).T
        np.testing.assert_allclose(run_model(model, x, tmp_path), expected, atol=1e-4)
        assert kernels(model, tmp_path)["MatMulIntegerToFloat"] == 1


def test_pruned_channels_are_absent_and_floats_apart(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    widths = np.repeat([16, 8, 4, 2, 0], [4, 8, 8, 8, 12]).astype(np.int8)
    generator.shuffle(widths)
    weight = generator.standard_normal((40, 128)).astype(np.float32)
    model = expanded_layer(weight, widths)
    used = kernels(model, tmp_path)
    assert used["MatMulIntegerToFloat"] == used["MatMul"] == 1
    optimized = ir.load(tmp_path / "optimized.onnx").graph
    sizes = {
        node.op_type: node.inputs[1].shape.numpy()[1]
        for node in optimized
        if node.op_type.startswith("MatMul") and node.inputs[1] is not None and node.inputs[1].shape
    }
    # Pruned channels read one more column, of zeros.
    assert sizes == {"MatMulIntegerToFloat": 24, "MatMul": 4 + 1}
    every = expanded_layer(weight, np.zeros(40, np.int8))
    x = generator.standard_normal((1, 3, 128)).astype(np.float32)
    assert not run_model(every, x, tmp_path).any()


def test_what_is_stored_are_the_packed_codes() -> None:
    generator = np.random.default_rng(4)
    widths = generator.choice([0, 2, 4, 8], 30).astype(np.int8)
    weight = generator.standard_normal((30, 200)).astype(np.float32)
    ranges = ActivationRanges(8, "max", {LAYER: LIMIT})
    stored: list[dict[str, bytes]] = []
    for rounded_inputs in (False, True):
        model = quantize_activations(linear_model(weight, None), ranges, LEVELED)
        kept: dict[str, bytes] = {}

        def store(tensor: ir.TensorProtocol, kept: dict[str, bytes] = kept) -> ir.TensorProtocol:
            kept[str(tensor.name)] = tensor.tobytes()
            return tensor

        bucketize(model, {LAYER: widths}, SPEC, LEVELED, store, rounded_inputs=rounded_inputs)
        stored.append(kept)
    assert stored[0] == stored[1]
    assert sum(map(len, stored[0].values())) == sum(
        bucket_bytes(int((widths == bits).sum()), 200, LEVELED.containers[bits])
        for bits in (2, 4, 8)
    )
