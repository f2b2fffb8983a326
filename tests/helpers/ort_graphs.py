"""Helpers of the graph tests: single layers as float graphs, ONNX Runtime on an ir.Model."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from numpy.typing import NDArray

from engines.ort import keep_integers_exact
from qvla_export.graph.float_graph import LAYER_KEY

LAYER = "tower.layer"


def constant(tape: ir.tape.Tape, name: str, value: NDArray[Any]) -> ir.Value:
    return tape.initializer(ir.Tensor(np.ascontiguousarray(value), name=name))


def model_of(tape: ir.tape.Tape, inputs: ir.Value, output: ir.Value) -> ir.Model:
    output.name, output.dtype = "y", ir.DataType.FLOAT
    graph = ir.Graph(
        [inputs],
        [output],
        nodes=tape.nodes,
        initializers=tape.initializers,
        opset_imports={"": 25},
        name="layer",
    )
    return ir.Model(graph, ir_version=13)


def linear_model(weight: NDArray[np.float32], bias: NDArray[np.float32] | None) -> ir.Model:
    """x [B, M, inputs] -> y [B, M, channels] of a weight [channels, inputs]."""
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, ("B", "M", weight.shape[1]))
    y = tape.op("MatMul", [x, constant(tape, "w", weight.T)], metadata_props={LAYER_KEY: LAYER})
    if bias is not None:
        y = tape.op("Add", [y, constant(tape, "b", bias)])
    return model_of(tape, x, y)


def gemm_model(weight: NDArray[np.float32], bias: NDArray[np.float32]) -> ir.Model:
    """x [M, inputs] -> y [M, channels]."""
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, ("M", weight.shape[1]))
    inputs = [x, constant(tape, "w", weight), constant(tape, "b", bias)]
    y = tape.op("Gemm", inputs, {"transB": 1}, metadata_props={LAYER_KEY: LAYER})
    return model_of(tape, x, y)


def conv_model(
    weight: NDArray[np.float32], bias: NDArray[np.float32] | None, side: int, **attributes: Any
) -> ir.Model:
    """x [2, C, side, side] -> y of a convolution whose stride is its kernel."""
    tape = ir.tape.Tape()
    x = ir.val("x", ir.DataType.FLOAT, (2, weight.shape[1], side, side))
    inputs = [x, constant(tape, "w", weight)]
    if bias is not None:
        inputs.append(constant(tape, "b", bias))
    settings = {"strides": list(weight.shape[2:]), **attributes}
    y = tape.op("Conv", inputs, settings, metadata_props={LAYER_KEY: LAYER})
    return model_of(tape, x, y)


def run_model(model: ir.Model, x: NDArray[np.float32], folder: Path) -> NDArray[np.float32]:
    """Run a graph with float32 inputs; products of rounded ones are exact on every CPU."""
    ir.save(model, folder / "model.onnx")
    options = float_options()
    if any(node.op_type == "QuantizeLinear" for node in model.graph):
        keep_integers_exact(options)
    session = onnxruntime.InferenceSession(
        str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    output: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return output


def packed_matmuls(model_path: Path, optimized: Path) -> Counter[int]:
    """Return how many MatMulNBits of each width ONNX Runtime makes of a graph."""
    options = float_options()
    options.optimized_model_filepath = str(optimized)
    onnxruntime.InferenceSession(str(model_path), options, providers=["CPUExecutionProvider"])
    nodes = ir.load(optimized).graph
    return Counter(n.attributes.get_int("bits") for n in nodes if n.op_type == "MatMulNBits")


def float_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return options
