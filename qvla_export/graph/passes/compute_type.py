"""Pass: a float32 graph becomes a strongly typed one that multiplies in a target's compute type.

What needs float32's range or precision keeps it: norms, softmax, angles of rotary embeddings. Each
value has one type, that of the node that makes it, and at most one Cast to the other; the graph's
inputs and outputs keep theirs.
"""

import functools

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from qvla_export.graph.buckets_to_onnx import COMPUTE_TYPES
from qvla_export.graph.float_graph import LAYER_KEY, ExportError
from qvla_export.graph.lazy_tensors import mapped
from qvla_export.shared.target import Target

_WIDE = ir.DataType.FLOAT
_NUMPY_TYPES = {
    ir.DataType.FLOAT16: np.dtype(np.float16),
    ir.DataType.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}
_FLOATS = frozenset(COMPUTE_TYPES.values())

# Sums of many terms, squares and their roots, angles: float16 has neither the range nor the bits.
_RANGE_CRITICAL = frozenset(
    [
        "LayerNormalization",
        "RMSNormalization",
        "GroupNormalization",
        "InstanceNormalization",
        "Softmax",
        "LogSoftmax",
        "Exp",
        "Log",
        "Pow",
        "Sqrt",
        "Reciprocal",
        "Cos",
        "Sin",
        "CumSum",
        "Range",
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSumExp",
    ]
)
# They join float32 neighbours, so that one Cast at the border is enough.
_FOLLOWING = frozenset(
    [
        "Add",
        "Sub",
        "Mul",
        "Div",
        "Neg",
        "Cast",
        "Concat",
        "Slice",
        "Split",
        "Reshape",
        "Transpose",
        "Squeeze",
        "Unsqueeze",
        "Expand",
    ]
)
_NORM_FACTORS = ("Sqrt", "Reciprocal")
# Pass on what they take, whatever its type.
_CARRIERS = ("Gather", "Reshape", "Slice", "Concat", "Expand", "Transpose", "Pad")
# Take values of any type and pass none on.
_TYPELESS = ("Shape", "Size")


def to_compute_type(model: ir.Model, target: Target) -> ir.Model:
    """Return a copy of a graph whose float32 arithmetic is done in the target's compute type.

    Args:
        model: float32; scales and constants of buckets may already have the compute type, their
            users need not.
        target: its `compute` decides; float32 changes nothing.

    Raises:
        ExportError: when a constant is read that the compute type cannot hold.
    """
    if target.compute == "float32":
        return model
    model = model.clone()
    _Typing(model.graph, COMPUTE_TYPES[target.compute]).run()
    return model


def float32_nodes(graph: ir.Graph) -> set[ir.Node]:
    """Return the nodes that stay in float32.

    They are the range-critical ones, elementwise nodes that feed only those, and the product of a
    norm: with its factor 1 / sqrt(...), and then with its weight.
    """
    wide = {node for node in graph if node.op_type in _RANGE_CRITICAL}
    for node in graph:
        makers = [value.producer() for value in node.inputs if value is not None]
        if node.op_type in ("Mul", "Div"):
            of_factor = any(m is not None and m.op_type in _NORM_FACTORS for m in makers)
            of_norm = any(m in wide and m.op_type in ("Mul", "Div") for m in makers if m)
            scaled = any(value is not None and value.is_initializer() for value in node.inputs)
            if of_factor or (of_norm and scaled):
                wide.add(node)
    for node in reversed(list(graph)):
        users = {use.node for value in node.outputs for use in value.uses()}
        # Not between buckets: each of their outputs would need a Cast of its own.
        apart = LAYER_KEY + ".part" not in node.metadata_props
        if apart and node.op_type in _FOLLOWING and users and users <= wide:
            wide.add(node)
    return wide


class _Typing:
    """Gives every node its type, and every input a value of that type."""

    def __init__(self, graph: ir.Graph, compute: ir.DataType) -> None:
        self._graph = graph
        self._compute = compute
        self._wide = float32_nodes(graph)
        self._converted: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self._graph):
            self._set_type(node, _WIDE if node in self._wide else self._compute)
        for output in list(self._graph.outputs):
            if output.dtype in _FLOATS and output.dtype != _WIDE:
                self._widen_output(output)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]

    def _set_type(self, node: ir.Node, dtype: ir.DataType) -> None:
        if node.op_type in _TYPELESS:
            node.outputs[0].type = ir.TensorType(ir.DataType.INT64)
            return
        if node.op_type == "Cast":
            if ir.DataType(node.attributes.get_int("to", 0)) in _FLOATS:
                node.attributes["to"] = ir.AttrInt64("to", dtype.value)
        else:
            for index, value in enumerate(node.inputs):
                if value is not None and value.dtype in _FLOATS and value.dtype != dtype:
                    node.replace_input_with(index, self._as(value, dtype, node))
        for value in node.outputs:
            if value.dtype in _FLOATS or value.dtype is None:
                # A type of its own: clones share the old one.
                value.type = ir.TensorType(self._type_of(node, dtype))

    def _type_of(self, node: ir.Node, dtype: ir.DataType) -> ir.DataType:
        """Type of a float output; that of a value whose type nobody stated is inferred."""
        if node.op_type in ("QuantizeLinear",):
            zero = node.inputs[2] if len(node.inputs) > 2 else None
            return ir.DataType.UINT8 if zero is None or zero.dtype is None else zero.dtype
        data = node.inputs[0] if node.inputs else None
        carries = node.op_type in _CARRIERS
        if carries and data is not None and data.dtype is not None and data.dtype not in _FLOATS:
            return data.dtype
        return dtype

    def _as(self, value: ir.Value, dtype: ir.DataType, user: ir.Node) -> ir.Value:
        """Return a value in another float type; its Cast is made once, before the first user."""
        key = (value, dtype)
        if key not in self._converted:
            if value.is_initializer() and value.const_value is not None:
                self._converted[key] = self._constant(value, value.const_value, dtype)
            else:
                tape = ir.tape.Tape()
                cast = tape.op("Cast", [value], {"to": dtype})
                cast.name = f"{value.name}.{dtype.name.lower()}"
                cast.type, cast.shape = ir.TensorType(dtype), value.shape
                producer = value.producer()
                if producer is None:
                    self._graph.insert_before(user, list(tape.nodes))
                else:
                    self._graph.insert_after(producer, list(tape.nodes))
                self._converted[key] = cast
        return self._converted[key]

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol, dtype: ir.DataType) -> ir.Value:
        name = f"{value.name}.{dtype.name.lower()}"
        function = functools.partial(_converted, name=str(value.name), dtype=dtype)
        constant = mapped([tensor], function, dtype, tensor.shape.numpy(), name)
        new = ir.Value(
            name=name,
            const_value=constant,
            type=ir.TensorType(dtype),
            shape=ir.Shape(tensor.shape.numpy()),
        )
        self._graph.register_initializer(new)
        return new

    def _widen_output(self, output: ir.Value) -> None:
        """Keep a graph output's name and type."""
        name, producer = output.name, output.producer()
        assert producer is not None
        tape = ir.tape.Tape()
        wide = tape.op("Cast", [output], {"to": _WIDE})
        output.name = f"{name}.{self._compute.name.lower()}"
        wide.name, wide.type, wide.shape = name, ir.TensorType(_WIDE), output.shape
        self._graph.outputs[self._graph.outputs.index(output)] = wide
        self._graph.insert_after(producer, list(tape.nodes))


def _converted(values: NDArray[np.generic], name: str, dtype: ir.DataType) -> NDArray[np.generic]:
    """Round to a float type; refuse what becomes infinite, and scales that would become 0."""
    if dtype == _WIDE:
        return values.astype(np.float32)
    with np.errstate(over="ignore"):
        narrow = values.astype(_NUMPY_TYPES[dtype])
    lost = np.isfinite(values) & ~np.isfinite(narrow)
    if lost.any():
        raise ExportError(
            f"constant {name} has {int(lost.sum())} values beyond {dtype.name.lower()}, the "
            f"largest {float(np.abs(values[lost]).max()):g}; the target's compute type cannot "
            "hold it, use a target that computes in float32 or bfloat16"
        )
    if name.endswith(".input_scale") and not (narrow > 0).all():
        raise ExportError(
            f"constant {name} is {float(values.min()):g}, which {dtype.name.lower()} rounds to "
            "0; scales must stay positive"
        )
    return narrow
