"""Pass: the inputs of planned layers are rounded to 8 bits, once for all layers that share one.

With 8-bit weights of one scale a channel ONNX Runtime and TensorRT then multiply integers.

Codes are signed around 0 on TensorRT and unsigned around 128, the same numbers, for ONNX Runtime on
a CPU: it makes signed codes unsigned itself on x86-64, where its kernels are u8 x s8, but 1.32
forgets the output type of a copy behind a Reshape and then refuses the graph. Zero points are
always there: without them it makes no integer product (23 instead of 2.1 ms for 300 x 2048 x 2048).

Where each token has a range of its own, the token is divided by its largest |x| before, so that
one constant scale suits all, and `bucketize` multiplies the product by it: the same integers.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.float_graph import ExportError, layer_nodes
from qvla_export.quantizer.activations import SMALLEST_TOKEN, TOKEN_RANGES, ActivationRanges
from qvla_export.shared.target import Target, UnsupportedOnTarget

# Metadata of the node that divides an input by the sizes of its tokens.
_TOKENS_KEY = "qvla.tokens"


def quantize_activations(
    model: ir.Model, activations: ActivationRanges, target: Target
) -> ir.Model:
    """Return a copy of a float graph with QuantizeLinear and DequantizeLinear before its layers.

    Runs before layers of one input are merged: they still share it afterwards. Scales are float32
    constants "<first layer>.input_scale".

    Args:
        model: from `export_float`, maybe after other passes; left as it is.
        activations: a range for each planned layer; 8 bits.
        target: decides the type of the codes.

    Raises:
        UnsupportedOnTarget: 4 bits, or a target without quantized activations.
        ExportError: a layer that is not in the graph, layers of one input with two ranges.
    """
    if activations.bits != 8 or "int8" not in target.activations:
        raise UnsupportedOnTarget(
            f"target {target.name!r} has no {activations.bits}-bit activations; 4 bits are "
            "simulated in torch only; plan for 8-bit or float activations"
        )
    if activations.per_token:
        target.require(TOKEN_RANGES)
    model = model.clone()
    nodes = layer_nodes(model)
    if missing := sorted(set(activations.ranges) - set(nodes)):
        raise ExportError(f"the plan has activation ranges of layers not in the graph: {missing}")
    shared: dict[ir.Value, list[str]] = {}
    for name, node in nodes.items():
        if name in activations.ranges and node.inputs[0] is not None:
            shared.setdefault(node.inputs[0], []).append(name)
    zero = np.array(128, np.uint8) if target.runtime == "ort" else np.array(0, np.int8)
    for value, names in shared.items():
        scales = {activations.scale(name) for name in names}
        if len(scales) > 1:
            raise ExportError(
                f"{names} share an input and must share its range, got "
                f"{[activations.ranges[name] for name in names]}; measure again: qvla activations"
            )
        # The first in graph order, so the value's other users come later.
        first, scale = nodes[names[0]], np.array(scales.pop())
        if names[0] in activations.per_token:
            value = _by_tokens(model.graph, value, first, names[0])
        rounded = _round(model.graph, value, first, names[0], scale, zero)
        for name in names:
            nodes[name].replace_input_with(0, rounded)
    return model


def token_sizes(value: ir.Value) -> ir.Value | None:
    """Return what rounded inputs of a layer were divided by, token by token; None for nothing.

    The layer's product has to be multiplied by it: [..., 1].
    """
    node: ir.Node | None = value.producer()
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        if node is None or node.op_type != kind or node.inputs[0] is None:
            return None
        node = node.inputs[0].producer()
    return node.inputs[1] if node is not None and node.metadata_props.get(_TOKENS_KEY) else None


def _by_tokens(graph: ir.Graph, value: ir.Value, before: ir.Node, name: str) -> ir.Value:
    """Insert what divides each token by its largest |x|; return the quotients."""
    tape = ir.tape.Tape()
    axis = tape.initializer(ir.Tensor(np.array([-1], np.int64), name=f"{name}.token_axis"))
    least = np.array(SMALLEST_TOKEN, np.float32)
    smallest = tape.initializer(ir.Tensor(least, name=f"{name}.token_smallest"))
    found = tape.op("ReduceMax", [tape.op("Abs", [value]), axis], {"keepdims": 1})
    sizes = tape.op("Max", [found, smallest])
    quotients = tape.op("Div", [value, sizes], metadata_props={_TOKENS_KEY: name})
    quotients.type, quotients.shape = value.type, value.shape
    for constant in tape.initializers:
        graph.register_initializer(constant)
    graph.insert_before(before, list(tape.nodes))
    return quotients


def _round(
    graph: ir.Graph,
    value: ir.Value,
    before: ir.Node,
    name: str,
    scale: NDArray[np.generic],
    zero: NDArray[np.generic],
) -> ir.Value:
    """Insert both nodes before a value's first user; return the rounded value."""
    tape = ir.tape.Tape()
    step = tape.initializer(ir.Tensor(scale, name=f"{name}.input_scale"))
    middle = tape.initializer(ir.Tensor(zero, name=f"{name}.input_zero"))
    codes = tape.op("QuantizeLinear", [value, step, middle])
    rounded = tape.op("DequantizeLinear", [codes, step, middle])
    codes.dtype, codes.shape = ir.DataType.from_numpy(zero.dtype), value.shape
    rounded.type, rounded.shape = value.type, value.shape
    for constant in tape.initializers:
        graph.register_initializer(constant)
    graph.insert_before(before, list(tape.nodes))
    return rounded
