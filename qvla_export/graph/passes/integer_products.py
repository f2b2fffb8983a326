"""Pass: what runtimes need to run a graph with rounded activations, or to run it well.

None of these changes moves a number. ONNX Runtime 1.32 on a CPU, measured 2026-11:
- A bias gets three dimensions. With a vector, MatMul and Add become a Gemm before integer products
  are looked for, and a Gemm stays in float and unpacks its weight anew in every run.
- A product with weights other than int8 reads the rounded activations through a Clip that clips
  nothing. Behind a DequantizeLinear, 4- and 2-bit weights are unpacked anew in every run too, and
  TensorRT-RTX 1.7 cannot build a product of such weights at all.
- An 8-bit weight whose products are rounded next, without a bias between, states its zero points.
  With `session.x64quantprecision` the runtime gives it one for all channels else, and then refuses
  to run its own graph: a weight with a scale a channel needs one a channel.
"""

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.float_graph import ExportError


def keep_integer_products(model: ir.Model) -> ir.Model:
    """Return a copy of a bucketized graph whose 8-bit buckets run as products of integers.

    Args:
        model: after `quantize_activations` and `bucketize`; left as it is.
    """
    model = model.clone()
    others: dict[ir.Value | None, list[ir.Node]] = {}
    for node in [n for n in model.graph if n.op_type == "MatMul"]:
        if _has_int8_weight(node):
            _widen_bias(model.graph, node)
            if _is_rounded_next(node.outputs[0]):
                _state_zero_points(model.graph, node)
        else:
            others.setdefault(node.inputs[0], []).append(node)
    for value, products in others.items():
        scale = None if value is None else _scale_of(value)
        if value is not None and scale is not None:
            _shield(model.graph, value, products, scale)
    return model


def _is_rounded_next(value: ir.Value) -> bool:
    """Say whether a value is rounded as it is, or reshaped first."""
    users = [use.node for use in value.uses()]
    return any(
        user.op_type == "QuantizeLinear"
        or (user.op_type in ("Reshape", "Transpose") and _is_rounded_next(user.outputs[0]))
        for user in users
    )


def _state_zero_points(graph: ir.Graph, product: ir.Node) -> None:
    """Give the weight of a product the zero points that it has: 0 for each channel."""
    weight = product.inputs[1]
    unpacked = None if weight is None else weight.producer()
    if unpacked is None or unpacked.op_type != "DequantizeLinear" or len(unpacked.inputs) > 2:
        return
    zeros = np.zeros(_length(unpacked.inputs[1]), np.int8)
    tensor = ir.Tensor(zeros, name=f"{unpacked.outputs[0].name}.zero_points")
    constant = ir.Value(
        name=tensor.name,
        const_value=tensor,
        type=ir.TensorType(ir.DataType.INT8),
        shape=ir.Shape(zeros.shape),
    )
    graph.register_initializer(constant)
    unpacked.resize_inputs(3)
    unpacked.replace_input_with(2, constant)


def _length(value: ir.Value | None) -> int:
    """Return how many scales of channels a value holds: a constant, or what is made of some."""
    assert value is not None
    tensor, node = ir.convenience.get_const_tensor(value), value.producer()
    if tensor is not None:
        return int(tensor.size)
    if node is not None and node.op_type == "Concat":
        return sum(map(_length, node.inputs))
    if node is not None and node.op_type == "Pad":
        pads = node.inputs[1]
        added = None if pads is None else ir.convenience.get_const_tensor(pads)
        assert added is not None
        return _length(node.inputs[0]) + int(added.numpy().sum())
    if node is not None and node.op_type in ("Gather", "Cast"):
        return _length(node.inputs[1 if node.op_type == "Gather" else 0])
    raise ExportError(f"{value.name} holds no scales of a weight's channels")


def _scale_of(value: ir.Value) -> NDArray[np.float32] | None:
    """Return the scale of rounded activations, maybe unfolded ones; None for other values."""
    node = value.producer()
    while node is not None and node.op_type in ("Reshape", "Transpose"):
        node = None if node.inputs[0] is None else node.inputs[0].producer()
    if node is None or node.op_type != "DequantizeLinear":
        return None
    codes, step = node.inputs[:2]
    rounded = codes is not None and codes.producer() is not None and step is not None
    tensor = ir.convenience.get_const_tensor(step) if rounded and step is not None else None
    return None if tensor is None else tensor.numpy()


def _shield(
    graph: ir.Graph, value: ir.Value, products: list[ir.Node], scale: NDArray[np.float32]
) -> None:
    """Put a Clip to the range of the codes between rounded activations and products."""
    tape = ir.tape.Tape()
    limits = [
        tape.initializer(ir.Tensor(np.array(code * scale), name=f"{value.name}.{side}"))
        for side, code in (("low", np.float32(-128)), ("high", np.float32(127)))
    ]
    clipped = tape.op("Clip", [value, *limits])
    clipped.type, clipped.shape = value.type, value.shape
    for constant in tape.initializers:
        graph.register_initializer(constant)
    graph.insert_before(products[0], list(tape.nodes))
    for product in products:
        product.replace_input_with(0, clipped)


def _widen_bias(graph: ir.Graph, product: ir.Node) -> None:
    """Give the vector that is added to a product [.., .., channels] three dimensions."""
    inputs, users = product.inputs[0], [use.node for use in product.outputs[0].uses()]
    shape = None if inputs is None else inputs.shape
    if len(users) != 1 or users[0].op_type != "Add" or (shape is not None and shape.rank() < 3):
        return
    for index, value in enumerate(users[0].inputs):
        tensor = None if value is None else ir.convenience.get_const_tensor(value)
        if value is not None and tensor is not None and len(tensor.shape) == 1:
            wide = ir.Tensor(tensor.numpy()[None, None], name=f"{value.name}.wide")
            # Layers of equal biases share one.
            constant = graph.initializers.get(f"{value.name}.wide") or ir.Value(
                name=wide.name, const_value=wide, type=value.type, shape=ir.Shape(wide.shape)
            )
            graph.register_initializer(constant)
            users[0].replace_input_with(index, constant)
            if value.name is not None and value.is_initializer() and not value.uses():
                del graph.initializers[value.name]


def _has_int8_weight(node: ir.Node) -> bool:
    unpacked = None if node.inputs[1] is None else node.inputs[1].producer()
    codes = None if unpacked is None else unpacked.inputs[0]
    return codes is not None and codes.dtype == ir.DataType.INT8
