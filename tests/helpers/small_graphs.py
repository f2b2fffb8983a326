"""Small graphs for TensorRT and ONNX Runtime, built node by node."""

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

INPUTS, CHANNELS, BLOCK = 256, 128, 128
FLOAT, HALF, INT8 = ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT8
Build = Callable[["Graph"], ir.Value]


class Graph:
    """x [1, 8, inputs] and the nodes that a case makes of it."""

    def __init__(self, inputs: int, dtype: ir.DataType) -> None:
        self.tape = ir.tape.Tape()
        self.x = ir.val("x", dtype, (1, 8, inputs))
        self.generator = np.random.default_rng(0)

    def op(self, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> Any:
        return self.tape.op(name, list(inputs), attributes, domain=domain)

    def const(self, value: NDArray[Any]) -> ir.Value:
        name = f"c{len(self.tape.initializers)}"
        return self.tape.initializer(ir.Tensor(np.ascontiguousarray(value), name=name))

    def codes(self, *shape: int, dtype: Any = np.int8, low: int = -7) -> ir.Value:
        return self.const(self.generator.integers(low, 8, shape).astype(dtype))

    def scales(self, *shape: int, dtype: Any = np.float16) -> ir.Value:
        return self.const(self.generator.uniform(0.001, 0.01, shape).astype(dtype))

    def one(self, value: float = 0.01, dtype: Any = np.float16) -> ir.Value:
        return self.const(np.array(value, dtype))

    def quantized(self, scale: ir.Value | None = None) -> ir.Value:
        """x through a pair of QuantizeLinear and DequantizeLinear."""
        shared = scale or self.one()
        codes = self.op("QuantizeLinear", self.x, shared, self.const(np.zeros((), np.int8)))
        return self.op("DequantizeLinear", codes, shared)

    def w8a8(self, codes: ir.Value, scale: ir.Value, *zero: ir.Value, **attributes: Any) -> Any:
        """Quantized x times int8 weights."""
        weight = self.op("DequantizeLinear", codes, scale, *zero, **{"axis": 1, **attributes})
        return self.op("MatMul", self.quantized(), weight)

    def w4(self, codes: ir.Value, scale: ir.Value, *zero: ir.Value, **attributes: Any) -> Any:
        """x times int4 weights in blocks along the inputs."""
        settings = {"axis": 0, "block_size": BLOCK, **attributes}
        return self.op(
            "MatMul", self.x, self.op("DequantizeLinear", codes, scale, *zero, **settings)
        )


def int4(g: Graph, *shape: int) -> ir.Value:
    return g.codes(*shape, dtype=ml_dtypes.int4)


def model(
    build: Build,
    opset: int = 21,
    ir_version: int = 10,
    inputs: int = INPUTS,
    dtype: ir.DataType = HALF,
    output: ir.DataType | None = None,
) -> ir.Model:
    g = Graph(inputs, dtype)
    y = build(g)
    y.name, y.dtype = "y", output or dtype
    graph = ir.Graph(
        [g.x],
        [y],
        nodes=g.tape.nodes,
        initializers=g.tape.initializers,
        opset_imports={"": opset, "com.microsoft": 1},
        name="case",
    )
    return ir.Model(graph, ir_version=ir_version)
