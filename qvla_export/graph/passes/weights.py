"""Constants of a graph, replaced by ones that are computed from them when they are read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.float_graph import ExportError
from qvla_export.graph.lazy_tensors import mapped

# Name of a layer's bias with what pruned hidden units put out: "<layer>" and this.
FOLDED_SUFFIX = ".folded_bias"


def matrix(node: ir.Node) -> ir.TensorProtocol:
    """Return a MatMul's constant weight [inputs, channels], unread.

    Raises:
        ExportError: it is not constant.
    """
    value = node.inputs[1]
    tensor = None if value is None else value.const_value
    if node.op_type != "MatMul" or tensor is None:
        raise ExportError(f"{node.op_type} {node.name} is no MatMul with a constant weight")
    return tensor


def picked(
    source: ir.TensorProtocol,
    order: NDArray[np.int64],
    axis: int,
    length: int,
    name: str,
) -> ir.TensorProtocol:
    """Return rows (axis 0) or columns (axis 1) of a weight in an order, then zeros up to a length.

    Args:
        source: the weight [inputs, channels].
        order: indices along the axis.
        axis, length: which axis, and how long it is in the result.
        name: of the result.
    """
    missing = [(0, 0), (0, 0)]
    missing[axis] = (0, length - len(order))
    shape = list(source.shape.numpy())
    shape[axis] = length

    def pick(weight: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.pad(weight.take(order, axis=axis), missing)

    return mapped([source], pick, source.dtype, shape, name)


def side_by_side(sources: Sequence[ir.TensorProtocol], name: str) -> ir.TensorProtocol:
    """Return the channels of weights [inputs, channels] of the same inputs as one weight."""
    shapes = [source.shape.numpy() for source in sources]
    shape = (shapes[0][0], sum(channels for _, channels in shapes))

    def join(*weights: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.concatenate(weights, axis=1)

    return mapped(sources, join, sources[0].dtype, shape, name)


def register(graph: ir.Graph, tensor: ir.TensorProtocol) -> ir.Value:
    """Add a constant to a graph."""
    value = ir.Value(
        name=tensor.name,
        const_value=tensor,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
    )
    graph.register_initializer(value)
    return value


def add_to_output(graph: ir.Graph, node: ir.Node, name: str, offset: NDArray[np.float32]) -> None:
    """Add a constant [channels] to a layer's output: to its bias, if it has one."""
    if node.op_type in ("Gemm", "Conv"):
        node.resize_inputs(3)
        bias = vector(node.inputs[2])
        total = offset if bias is None else bias + offset
        folded = register(graph, ir.Tensor(total, name=f"{name}{FOLDED_SUFFIX}"))
        node.replace_input_with(2, folded)
        return
    users = [use.node for use in node.outputs[0].uses()]
    if len(users) == 1 and users[0].op_type == "Add":
        for index, value in enumerate(users[0].inputs):
            bias = vector(value)
            if bias is not None and bias.shape == offset.shape:
                folded = register(graph, ir.Tensor(bias + offset, name=f"{name}{FOLDED_SUFFIX}"))
                users[0].replace_input_with(index, folded)
                return
    tape = ir.tape.Tape()
    output = node.outputs[0]
    added = register(graph, ir.Tensor(offset, name=f"{name}{FOLDED_SUFFIX}"))
    shifted = tape.op("Add", [output, added])
    shifted.type, shifted.shape = output.type, output.shape
    shifted.name, output.name = output.name, f"{output.name}.unshifted"
    output.replace_all_uses_with(shifted, replace_graph_outputs=True)
    tape.nodes[0].replace_input_with(0, output)
    graph.insert_after(node, list(tape.nodes))


def vector(value: ir.Value | None) -> NDArray[Any] | None:
    """Return the numbers of a constant of one dimension, else None."""
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return tensor.numpy() if tensor is not None and len(tensor.shape) == 1 else None
