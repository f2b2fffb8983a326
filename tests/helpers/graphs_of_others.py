"""Quantized graphs as other tools write them, after public bug reports, and who builds them.

TensorRT issue 2774, ONNX Runtime issues 14229 and 25823, RT-DETR issue 343, ONNX issue 7752, and
int4 as NVIDIA's Model Optimizer writes it: in float32, where this project's graphs are float16.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from small_graphs import FLOAT, Build, Graph, int4, model

F32 = np.float32
FP8 = ml_dtypes.float8_e4m3fn
Codes = Callable[[Graph], ir.Value]


@dataclass(frozen=True)
class Foreign:
    """One graph, and whether TensorRT-RTX 1.7.1.116 parses and builds it for sm_89."""

    name: str
    build: Build
    is_built: bool
    inputs: int = 64
    opset: int = 21
    ir_version: int = 10
    dtype: ir.DataType = FLOAT

    def model(self) -> ir.Model:
        return model(self.build, self.opset, self.ir_version, self.inputs, self.dtype)


def _pair(g: Graph, zero: Any, scale: ir.Value | None = None) -> ir.Value:
    """x through QuantizeLinear and DequantizeLinear with a zero point."""
    scale, point = scale or g.one(0.05, F32), g.const(np.asarray(zero))
    return g.op("DequantizeLinear", g.op("QuantizeLinear", g.x, scale, point), scale, point)


def _w8(g: Graph, scale: ir.Value | None = None) -> ir.Value:
    return g.op("DequantizeLinear", g.codes(64, 32), scale or g.scales(32, dtype=F32), axis=1)


def _w8a8(zero: Any) -> Build:
    return lambda g: g.op("MatMul", _pair(g, zero), _w8(g))


def _weights(codes: Codes, *scale: int, zero: Any = None, **attributes: int) -> Build:
    def build(g: Graph) -> ir.Value:
        points = [] if zero is None else [g.const(zero)]
        weight = g.op(
            "DequantizeLinear", codes(g), g.scales(*scale, dtype=F32), *points, **attributes
        )
        return g.op("MatMul", g.x, weight)

    return build


def _int4(*shape: int) -> Codes:
    return lambda g: int4(g, *shape)


def _int4_block(block: int) -> Build:
    return _weights(_int4(256, 64), 256 // block, 64, axis=0, block_size=block)


def _channel_activations(g: Graph) -> ir.Value:
    scale = g.scales(64, dtype=F32)
    codes = g.op("QuantizeLinear", g.x, scale, axis=2)
    return g.op("MatMul", g.op("DequantizeLinear", codes, scale, axis=2), _w8(g))


def _transposed(g: Graph) -> ir.Value:
    weight = g.op("DequantizeLinear", g.codes(32, 64), g.scales(32, dtype=F32), axis=0)
    return g.op("MatMul", _pair(g, np.int8(0)), g.op("Transpose", weight, perm=[1, 0]))


def _pair_of_weights(g: Graph) -> ir.Value:
    weight = g.const(g.generator.normal(size=(64, 32)).astype(F32))
    scale, zero = g.scales(32, dtype=F32), g.const(np.zeros(32, np.int8))
    codes = g.op("QuantizeLinear", weight, scale, zero, axis=1)
    dequantized = g.op("DequantizeLinear", codes, scale, zero, axis=1)
    return g.op("MatMul", _pair(g, np.int8(0)), dequantized)


def _bias(g: Graph) -> ir.Value:
    bias = g.const(g.generator.integers(-99, 99, 32).astype(np.int32))
    dequantized = g.op("DequantizeLinear", bias, g.scales(32, dtype=F32), axis=0)
    return g.op("Add", _w8a8(np.int8(0))(g), dequantized)


def _cast_scale(g: Graph) -> ir.Value:
    scale = g.op("Cast", g.scales(32), to=FLOAT)
    return g.op("MatMul", _pair(g, np.int8(0)), _w8(g, scale))


def _fp8(g: Graph) -> ir.Value:
    weight = g.op("DequantizeLinear", g.codes(64, 32, dtype=FP8), g.one(0.05, F32))
    return g.op("MatMul", _pair(g, np.zeros((), FP8)), weight)


def _int4_inputs(g: Graph) -> ir.Value:
    return g.op("MatMul", _pair(g, np.zeros((), ml_dtypes.int4)), _w8(g))


def _picture(g: Graph) -> ir.Value:
    return g.op("Reshape", g.x, g.const(np.array([1, 8, 8, 8])))


def _elementwise(g: Graph) -> ir.Value:
    """One after another, those that TensorRT builds and few graphs have."""
    y: ir.Value = g.x
    names = "Acos Acosh Asin Asinh Atan Atanh Celu Cosh Dropout Selu Sinh ThresholdedRelu"
    for name in f"{names} Hardmax Mish Shrink LpNormalization".split():
        y = g.op(name, y)
    return g.op("Cast", g.op("IsInf", y), to=FLOAT)


def _of_pictures(g: Graph) -> ir.Value:
    y = g.op("SpaceToDepth", g.op("DepthToSpace", _picture(g), blocksize=2), blocksize=2)
    y = g.op("MeanVarianceNormalization", g.op("LRN", y, size=3))
    ones = g.const(np.ones(8, F32))
    y = g.op("GroupNormalization", y, ones, ones, num_groups=4)
    y = g.op("AveragePool", y, kernel_shape=[2, 2])
    y = g.op("LpPool", y, kernel_shape=[2, 2])
    y = g.op("Einsum", y, g.const(np.ones((6, 4), F32)), equation="abij,jk->abik")
    return g.op("Add", g.op("GlobalMaxPool", y), g.op("GlobalLpPool", y))


def _of_another_domain(name: str) -> Build:
    """ONNX Runtime's quantizer writes its own domain; TensorRT looks at the operator's name."""

    def build(g: Graph) -> ir.Value:
        if name == "FastGelu":
            return g.op(name, g.x, domain="com.microsoft")
        scale, zero = g.one(0.05, F32), g.const(np.zeros((), np.int8))
        codes = g.op("QuantizeLinear", g.x, scale, zero, domain="com.microsoft")
        pair = g.op("DequantizeLinear", codes, scale, zero, domain="com.microsoft")
        return g.op("MatMul", pair, _w8(g))

    return build


def _zero_scale(g: Graph) -> ir.Value:
    scale = g.const(np.array([0, *[0.01] * 31], F32))
    return g.op("MatMul", _pair(g, np.int8(0)), _w8(g, scale))


def _dynamic(g: Graph) -> ir.Value:
    codes, scale, zero = g.tape.op_multi_out("DynamicQuantizeLinear", [g.x], num_outputs=3)
    product = g.op("MatMulInteger", codes, g.codes(64, 32), zero)
    return g.op("Mul", g.op("Cast", product, to=FLOAT), scale)


def _qlinear(g: Graph) -> ir.Value:
    scale, zero = g.one(0.05, F32), g.const(np.zeros((), np.int8))
    codes = g.op("QuantizeLinear", g.x, scale, zero)
    product = g.op("QLinearMatMul", codes, scale, zero, g.codes(64, 32), scale, zero, scale, zero)
    return g.op("DequantizeLinear", product, scale, zero)


def _matmul_nbits(g: Graph) -> ir.Value:
    codes = g.codes(32, 2, 16, dtype=np.uint8, low=0)
    settings = {"K": 64, "N": 32, "bits": 4, "block_size": 32}
    return g.op(
        "MatMulNBits", g.x, codes, g.scales(64, dtype=F32), domain="com.microsoft", **settings
    )


FOREIGN = [
    Foreign("int8", _w8a8(np.int8(0)), True),
    Foreign("int8, operator set 13", _w8a8(np.int8(0)), True, opset=13, ir_version=8),
    Foreign("int8, operator set 25", _w8a8(np.int8(0)), True, opset=25, ir_version=11),
    Foreign("activations a channel", _channel_activations, True),
    Foreign("weights behind a Transpose", _transposed, True),
    Foreign("QuantizeLinear on weights", _pair_of_weights, True),
    Foreign("int4, blocks of 128", _int4_block(128), True, 256),
    Foreign(
        "int4, blocks of 128, float16",
        lambda g: g.w4(int4(g, 256, 64), g.scales(2, 64)),
        True,
        256,
        dtype=ir.DataType.FLOAT16,
    ),
    Foreign("int4, blocks of 64", _int4_block(64), True, 256),
    Foreign("int4, blocks of 32", _int4_block(32), True, 256),
    Foreign("int4, blocks of 16", _int4_block(16), True, 256),
    Foreign("int4, one block", _int4_block(256), True, 256),
    Foreign(
        "int4, blocks along channels",
        _weights(_int4(256, 64), 256, 1, axis=1, block_size=64),
        True,
        256,
    ),
    Foreign(
        "int4, blocks not whole",
        _weights(_int4(250, 64), 2, 64, axis=0, block_size=100),
        True,
        250,
    ),
    Foreign("int4 a channel", _weights(_int4(64, 32), 32, axis=1), True),
    Foreign("fp8", _fp8, True),
    Foreign(
        "int8 in blocks",
        _weights(lambda g: g.codes(64, 32), 2, 32, axis=0, block_size=32),
        True,
    ),
    Foreign("float16 scale behind a Cast", _cast_scale, True),
    Foreign("int4 activations", _int4_inputs, True),
    Foreign("rare functions", _elementwise, True),
    Foreign("rare operators of pictures", _of_pictures, True),
    Foreign("Q and DQ of com.microsoft", _of_another_domain("QuantizeLinear"), True),
    Foreign("FastGelu of com.microsoft", _of_another_domain("FastGelu"), False),
    Foreign("uint8, asymmetric", _w8a8(np.uint8(128)), False),
    Foreign("int8, asymmetric", _w8a8(np.int8(3)), False),
    Foreign("int32 bias", _bias, False),
    Foreign("DynamicQuantizeLinear", _dynamic, False),
    Foreign("QLinearMatMul", _qlinear, False),
    Foreign(
        "uint4 with zero points",
        _weights(
            lambda g: g.codes(256, 64, dtype=ml_dtypes.uint4, low=0),
            2,
            64,
            zero=np.full((2, 64), 8, ml_dtypes.uint4),
            axis=0,
            block_size=128,
        ),
        False,
        256,
    ),
    Foreign(
        "int4 with zero points",
        _weights(
            _int4(256, 64),
            2,
            64,
            zero=np.ones((2, 64), ml_dtypes.int4),
            axis=0,
            block_size=128,
        ),
        False,
        256,
    ),
    Foreign("MatMulNBits", _matmul_nbits, False),
    Foreign("a scale of 0", _zero_scale, False),
    Foreign("int16 activations", _w8a8(np.int16(0)), False),
    Foreign(
        "int2",
        _weights(lambda g: g.codes(64, 32, dtype=ml_dtypes.int2, low=-2), 32, axis=1),
        False,
        opset=25,
        ir_version=12,
    ),
]
