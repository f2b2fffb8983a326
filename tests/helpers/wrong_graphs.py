"""One graph wrong in each known way, for TensorRT and ONNX Runtime."""

from dataclasses import dataclass
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from small_graphs import BLOCK, CHANNELS, FLOAT, HALF, INPUTS, INT8, Build, Graph, int4, model


@dataclass(frozen=True)
class Case:
    """A graph that breaks exactly one rule."""

    rule: str
    build: Build
    # What the parser and builder of TensorRT-RTX 1.7.1 do with it. "accepts": documents forbid what
    # it takes, because it computes something else or loses the packed weights, or because another
    # version does not take it; for target rtx4070 that is a warning, elsewhere an error.
    parser: Literal["rejects", "accepts", "not tried"] = "rejects"
    target: str = "rtx4070"
    opset: int = 21
    ir_version: int = 10
    inputs: int = INPUTS
    dtype: ir.DataType = HALF
    output: ir.DataType | None = None

    def model(self) -> ir.Model:
        return model(self.build, self.opset, self.ir_version, self.inputs, self.dtype, self.output)


def _scale(value: float) -> Build:
    return lambda g: g.w8a8(
        g.codes(INPUTS, CHANNELS), g.const(np.full(CHANNELS, value, np.float16))
    )


def _block_scale(value: float) -> Build:
    return lambda g: g.w4(
        int4(g, INPUTS, CHANNELS), g.const(np.full((2, CHANNELS), value, np.float16))
    )


def _cast(to: ir.DataType) -> Build:
    return lambda g: g.op("Cast", g.op("Cast", g.x, to=to), to=HALF)


def _per_channel_activations(g: Graph) -> ir.Value:
    scale, zero = g.scales(INPUTS), g.const(np.zeros(INPUTS, np.int8))
    return g.op("DequantizeLinear", g.op("QuantizeLinear", g.x, scale, zero, axis=2), scale, axis=2)


def _float_scale(g: Graph) -> ir.Value:
    zero, scale = g.const(np.zeros((), np.int8)), g.one(0.5, np.float32)
    return g.op("DequantizeLinear", g.op("QuantizeLinear", g.x, scale, zero), g.one(0.5))


def _other_scale(g: Graph) -> ir.Value:
    codes = g.op("QuantizeLinear", g.x, g.one(0.01), g.const(np.zeros((), np.int8)))
    return g.op("DequantizeLinear", codes, g.one(0.02))


def _transposed(g: Graph) -> ir.Value:
    weight = g.op("DequantizeLinear", g.codes(CHANNELS, INPUTS), g.scales(CHANNELS), axis=0)
    return g.op("MatMul", g.quantized(), g.op("Transpose", weight, perm=[1, 0]))


def _gemm_axis(g: Graph) -> ir.Value:
    rows = g.op("Reshape", g.quantized(), g.const(np.array([8, INPUTS])))
    weight = g.op("DequantizeLinear", g.codes(CHANNELS, INPUTS), g.scales(INPUTS), axis=1)
    return g.op("Gemm", rows, weight, transB=1)


def _norm_outputs(g: Graph) -> ir.Value:
    mean = g.tape.op_multi_out("LayerNormalization", [g.x, g.scales(INPUTS)], num_outputs=2)[1]
    return g.op("Identity", mean)


def _weight(codes: Build, *scale: int, **attributes: Any) -> Build:
    """x times dequantized weights."""

    def build(g: Graph) -> ir.Value:
        weight = g.op("DequantizeLinear", codes(g), g.scales(*scale), **attributes)
        return g.op("MatMul", g.x, weight)

    return build


def _computed_scale(g: Graph) -> ir.Value:
    start, stop, axis = (g.const(np.array([value])) for value in (0, 1, 1))
    row = g.op("Slice", g.x, start, stop, axis)
    return g.w4(int4(g, INPUTS, CHANNELS), g.op("Reshape", row, g.const(np.array([2, CHANNELS]))))


def _int32_slice(g: Graph) -> ir.Value:
    return g.op("Slice", g.x, *(g.const(np.array([value], np.int32)) for value in (0, 4, 2)))


def _int4_activations(g: Graph) -> ir.Value:
    codes = g.op("QuantizeLinear", g.x, g.one(), output_dtype=ir.DataType.INT4)
    return g.op("DequantizeLinear", codes, g.one())


def _relu(g: Graph) -> ir.Value:
    return g.op("Relu", g.x)


def _int2(channels: int, dtype: Any = np.float16) -> Build:
    def build(g: Graph) -> ir.Value:
        codes = g.codes(INPUTS, channels, dtype=ml_dtypes.int2, low=-2)
        return g.w4(codes, g.scales(2, channels, dtype=dtype))

    return build


def _uint4(g: Graph) -> ir.Value:
    return g.w4(g.codes(INPUTS, 8, dtype=ml_dtypes.uint4, low=0), g.scales(2, 8))


def _add(dtype: Any) -> Build:
    return lambda g: g.op("Add", g.x, g.one(1, dtype))


def _zero_points(zero: NDArray[Any]) -> Build:
    return lambda g: g.w8a8(g.codes(INPUTS, 8), g.scales(8), g.const(zero))


_bitwise: Build = lambda g: g.op("BitwiseNot", g.op("Cast", g.x, to=6))  # noqa: E731  # short
_int8: Build = lambda g: g.codes(INPUTS, 8)  # noqa: E731  # short
_int4: Build = lambda g: int4(g, INPUTS, 8)  # noqa: E731  # short
_E4M3 = ml_dtypes.float8_e4m3fn
_fp8 = _weight(lambda g: g.codes(INPUTS, 8, dtype=_E4M3))


def _fp8_zero_points(g: Graph) -> ir.Value:
    codes, zeros = g.codes(INPUTS, 8, dtype=_E4M3), g.const(np.ones(8, _E4M3))
    return g.op("MatMul", g.x, g.op("DequantizeLinear", codes, g.scales(8), zeros, axis=1))


def _fp8_cast(g: Graph) -> ir.Value:
    return g.op("Cast", g.op("Cast", g.x, to=ir.DataType.FLOAT8E4M3FN), to=HALF)


def _uint8_weight(g: Graph) -> ir.Value:
    codes = g.codes(INPUTS, 8, dtype=np.uint8, low=0)
    return g.op("MatMul", g.x, g.op("DequantizeLinear", codes, g.scales(8), axis=1))


def _uint8_zero_point(g: Graph) -> ir.Value:
    zero = g.const(np.zeros((), np.uint8))
    codes = g.op("QuantizeLinear", g.x, g.one(), zero)
    return g.op("DequantizeLinear", codes, g.one(), zero)


POOLS = ("AveragePool", "MaxPool", "LpPool")


def _pooled(name: str, shape: tuple[int, ...], dilation: int) -> Build:
    def build(g: Graph) -> ir.Value:
        x = g.op("Reshape", g.x, g.const(np.array(shape)))
        places = len(shape) - 2
        return g.op(name, x, kernel_shape=[2] * places, dilations=[dilation] * places)

    return build


def _dropout(training: bool) -> Build:
    return lambda g: g.op("Dropout", g.x, g.one(0.5), g.const(np.array(training)))


def _rms_norm(g: Graph) -> ir.Value:
    return g.op("RMSNormalization", g.x, g.scales(INPUTS))


Q = "quantization"
CASES = [
    Case("graph.opset", _relu, "accepts", "orin-jp7", 25),
    Case("graph.opset-undocumented", _relu, "accepts", opset=26, ir_version=13),
    Case("graph.opset", _relu, "accepts", "orin-jp6", 22),
    Case("graph.opset", _relu, "not tried", "cpu", 26),
    Case("graph.opset-undocumented", _relu, "accepts", opset=23),
    Case("graph.opset-undocumented", _relu, "accepts", "orin-jp6"),
    Case("graph.ir-version", _relu, "accepts", ir_version=14),
    Case("graph.domain", lambda g: g.op("BiasGelu", g.x, g.one(), domain="com.microsoft")),
    Case("graph.untyped", lambda g: g.op("Identity", g.op("Concat", g.x, g.x))),
    Case("graph.output-type", _relu, "accepts", output=FLOAT),
    Case("operator.unsupported", _bitwise, output=ir.DataType.INT32),
    Case("operator.unknown", lambda g: g.op("Det", g.x), inputs=8),
    Case(
        "operator.runtime-version",
        lambda g: g.op("RMSNormalization", g.x, g.scales(INPUTS)),
        "accepts",
        "orin-jp7",
        23,
    ),
    Case("operator.opset", lambda g: g.op("Gelu", g.x), "accepts", opset=19),
    Case("operator.opset", lambda g: g.op("Gelu", g.x), "not tried", "cpu", opset=19),
    Case("operator.inputs", lambda g: g.op("MatMul", g.x)),
    Case(
        "operator.type",
        lambda g: g.op("MatMul", g.x, g.codes(8, 4, dtype=np.int64)),
        inputs=8,
        dtype=ir.DataType.INT64,
    ),
    Case("operator.limit", _norm_outputs, output=FLOAT),
    Case("operator.limit", lambda g: g.op("Cast", g.x, to=INT8), "accepts", output=INT8),
    Case("operator.limit", lambda g: g.op("Pow", g.x, g.const(np.array(2))), "accepts", "orin-jp6"),
    Case("operator.limit", _int32_slice),
    *(Case("operator.limit", _pooled(name, (1, 8, 16, 16), 2)) for name in POOLS),
    Case("operator.limit", _pooled("LpPool", (1, 8, 256), 1)),
    *(Case("operator.limit", _pooled(name, (1, 8, 256), 1), "accepts") for name in POOLS[:2]),
    Case("operator.limit", _pooled("MaxPool", (1, 8, 256), 1), "not tried", "orin-jp7"),
    Case("operator.limit", _dropout(True)),
    Case("operator.equal-types", _add(np.float32)),
    Case(
        "operator.equal-types", lambda g: g.op("MatMul", g.x, g.scales(INPUTS, 4, dtype=np.float32))
    ),
    Case("operator.equal-types", _add(np.float16), "not tried", "cpu", dtype=FLOAT),
    Case("type.missing", _uint4),
    Case("type.missing", _int2(8), opset=22),
    Case("type.missing", _int2(8), "not tried", "cuda"),
    Case("type.missing", _cast(ir.DataType.DOUBLE), "accepts"),
    Case("type.missing", _fp8, "accepts"),
    Case("type.missing", _fp8, "not tried", "orin-jp7"),
    Case(
        "type.compute",
        lambda g: g.op("MatMul", g.x, g.scales(INPUTS, 8, dtype=np.float32)),
        "accepts",
        dtype=FLOAT,
    ),
    Case("operator.type", lambda g: g.op("Relu", g.x), dtype=ir.DataType.UINT8),
    Case("type.uint8", _cast(ir.DataType.UINT8)),
    Case(f"{Q}.scale-constant", _computed_scale, "accepts"),
    *(Case(f"{Q}.scale-values", _scale(value)) for value in (0.0, -1.0, np.nan)),
    Case(f"{Q}.scale-values", _scale(np.inf), "accepts"),
    *(Case(f"{Q}.scale-values", _block_scale(value), "accepts") for value in (0.0, -1.0, np.nan)),
    Case(f"{Q}.scale-values", _block_scale(0.0), "not tried", "cuda"),
    Case(f"{Q}.scale-shape", lambda g: g.w8a8(_int8(g), g.scales(6))),
    Case(
        f"{Q}.scale-shape", lambda g: g.w4(int4(g, 200, 8), g.scales(2, 8)), "accepts", inputs=200
    ),
    Case(
        f"{Q}.scale-type",
        lambda g: g.w4(_int4(g), g.scales(2, 8, dtype=np.float32)),
        "accepts",
        dtype=FLOAT,
    ),
    Case(f"{Q}.symmetric", _zero_points(np.ones(8, np.int8))),
    Case(f"{Q}.symmetric", _zero_points(np.zeros(8, ml_dtypes.int4)), "accepts"),
    Case(f"{Q}.int8-blocks", lambda g: g.w8a8(_int8(g), g.scales(2, 8), axis=0, block_size=BLOCK)),
    Case(
        f"{Q}.mixed-types",
        lambda g: g.op(
            "MatMul",
            g.quantized(),
            g.op("DequantizeLinear", _int4(g), g.scales(2, 8), axis=0, block_size=BLOCK),
        ),
    ),
    Case(
        f"{Q}.mixed-types",
        lambda g: g.op(
            "MatMul",
            g.quantized(),
            g.op("DequantizeLinear", g.codes(INPUTS, 8, dtype=_E4M3), g.one()),
        ),
    ),
    Case(
        f"{Q}.int8-blocks",
        lambda g: g.op(
            "MatMul",
            g.x,
            g.op("DequantizeLinear", _int8(g), g.scales(2, 8), axis=0, block_size=BLOCK),
        ),
        "accepts",
    ),
    Case(
        f"{Q}.constant-weights",
        lambda g: g.op(
            "MatMul",
            g.x,
            g.op(
                "DequantizeLinear",
                g.op("Transpose", g.codes(8, INPUTS), perm=[1, 0]),
                g.scales(8),
                axis=1,
            ),
        ),
    ),
    Case(f"{Q}.scale-shape", lambda g: g.w4(_int4(g), g.scales(3, 8))),
    Case(
        f"{Q}.scale-type",
        lambda g: g.w4(_int4(g), g.scales(2, 8), output_dtype=FLOAT),
        opset=23,
        dtype=FLOAT,
    ),
    Case(f"{Q}.symmetric", _fp8_zero_points, "accepts"),
    Case("type.missing", _fp8_cast),
    Case("type.uint8", _uint8_weight),
    Case("type.uint8", _uint8_zero_point, "accepts"),
    Case("operator.runtime-version", _rms_norm, "accepts", opset=23),
    Case("operator.type", lambda g: g.op("Transpose", g.x), "accepts", dtype=INT8, output=INT8),
    Case(
        f"{Q}.block-axis",
        lambda g: g.w4(int4(g, 4, INPUTS, 8), g.scales(2, INPUTS, 8), block_size=2),
    ),
    Case(
        f"{Q}.even-int4", lambda g: g.w4(int4(g, INPUTS, 7), g.scales(2, 7)), "accepts", "orin-jp7"
    ),
    Case(f"{Q}.even-int4", _weight(lambda g: int4(g, 3, 7)), inputs=3),
    Case(f"{Q}.constant-weights", _int4_activations, "accepts"),
    Case(
        f"{Q}.constant-weights",
        lambda g: g.op("DequantizeLinear", g.x, g.scales(INPUTS), axis=2),
        "accepts",
        dtype=INT8,
        output=HALF,
    ),
    Case(f"{Q}.per-tensor-activations", _per_channel_activations, "accepts"),
    Case(f"{Q}.channel-axis", _weight(_int8, INPUTS, axis=0), "accepts"),
    Case(
        f"{Q}.channel-axis",
        lambda g: g.w4(int4(g, INPUTS, 128), g.scales(INPUTS, 1), axis=1),
        "accepts",
    ),
    Case(f"{Q}.channel-axis", _gemm_axis, "accepts"),
    Case(f"{Q}.between", _transposed, "accepts"),
    Case(f"{Q}.pairs", _other_scale, "accepts"),
    Case(
        f"{Q}.pairs",
        lambda g: g.op("QuantizeLinear", g.x, g.one(), g.const(np.zeros((), np.int8))),
        "accepts",
        output=INT8,
    ),
    Case(
        f"{Q}.pairs",
        lambda g: g.op("DequantizeLinear", g.x, g.one()),
        "accepts",
        dtype=INT8,
        output=HALF,
    ),
    Case(f"{Q}.input-type", _float_scale, "accepts"),
    Case(
        f"{Q}.output-type",
        lambda g: g.op("DequantizeLinear", g.op("QuantizeLinear", g.x, g.one()), g.one()),
        "accepts",
    ),
    Case(f"{Q}.block-size", lambda g: g.w4(_int4(g), g.scales(8, 8), block_size=32), "accepts"),
    Case(f"{Q}.int4-per-channel", _weight(_int4, 8, axis=1), "accepts"),
    Case(f"{Q}.int8-weight-only", _weight(_int8, 8, axis=1), "accepts"),
    Case("ort.int2-columns", _int2(6, np.float32), "not tried", "cpu", 25, 13, dtype=FLOAT),
    Case(
        "ort.zero-point",
        lambda g: g.op("QuantizeLinear", g.x, g.one(dtype=np.float32), output_dtype=INT8),
        "not tried",
        "cpu",
        dtype=FLOAT,
        output=INT8,
    ),
    Case(
        "ort.unfused-scale",
        _weight(_int8, 8, axis=1, output_dtype=FLOAT),
        "not tried",
        "cpu",
        25,
        13,
        dtype=FLOAT,
    ),
]
