"""Pass: constant hidden units leave an MLP; the others take the order of the producers' widths.

No order needs to be restored behind the producers then; see `qvla_export.quantizer.coupling`.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from scipy.special import erf, expit

from qvla_export.graph.float_graph import ExportError, layer_nodes
from qvla_export.graph.passes.weights import add_to_output, matrix, picked, register, vector
from qvla_export.quantizer.coupling import Coupling
from qvla_export.quantizer.packed_storage import producer_widths, stored_inputs
from qvla_export.shared.target import Container

Widths = Mapping[str, NDArray[np.int8]]
_Units = NDArray[np.float64]

# What may lie between producers and consumer; each unit must stay by itself.
_ELEMENTWISE: dict[str, Callable[..., _Units]] = {
    "Add": np.add,
    "Gelu": lambda x: x / 2 * (1 + erf(x / np.sqrt(2))),
    "Mul": np.multiply,
    "Relu": lambda x: np.maximum(x, 0),
    "Sigmoid": expit,
}
# The values of `approximate`; ONNX defines the second one so.
_GELUS: dict[str, Callable[..., _Units]] = {
    "none": _ELEMENTWISE["Gelu"],
    "tanh": lambda x: x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
}


def couple_mlps(
    model: ir.Model,
    widths: Widths,
    couplings: Iterable[Coupling],
    containers: Mapping[int, Container],
    compensated: bool = False,
) -> tuple[ir.Model, dict[str, NDArray[np.int8]]]:
    """Return a copy of a float graph with reordered and pruned hidden units, and its widths.

    Where the consumer is stored in whole groups of inputs, units of zeros fill the last one up: no
    activation needs to be padded then.

    Args:
        model: from `export_float`; left as it is.
        widths: layer name -> int8 [channels] of the planned layers.
        couplings: from `find_couplings`.
        containers: of the target.
        compensated: whether the codes answer for what constant units put out: their weights are
            zero then. Else a bias of the consumer takes it up.

    Raises:
        ExportError: between producers and consumer lies what this pass cannot follow.
    """
    model = model.clone()
    nodes = layer_nodes(model)
    coupled = dict(widths)
    for coupling in couplings:
        hidden = _hidden_nodes(nodes, coupling)
        consumer = nodes[coupling.consumer]
        weight = matrix(consumer)
        if coupling.folds and not compensated:
            constants = _constants(nodes, coupling, hidden)[coupling.constant_units]
            offset = constants @ weight.numpy()[coupling.constant_units].astype(np.float64)
            add_to_output(model.graph, consumer, coupling.consumer, offset.astype(np.float32))
        order = coupling.order
        units = stored_inputs(len(order), widths[coupling.consumer], containers)
        kept = picked(weight, order, 0, units, f"{coupling.consumer}.coupled")
        consumer.replace_input_with(1, register(model.graph, kept))
        for name in coupling.producers:
            kept = picked(matrix(nodes[name]), order, 1, units, f"{name}.coupled")
            nodes[name].replace_input_with(1, register(model.graph, kept))
            _narrow(nodes[name].outputs[0], units)
        coupled |= producer_widths(widths, coupling, units)
        _reorder(model.graph, hidden, coupling, units)
    return model, coupled


def _hidden_nodes(nodes: Mapping[str, ir.Node], coupling: Coupling) -> list[ir.Node]:
    """Return the nodes between producers and consumer, in graph order.

    Their values must go nowhere else, and with two producers nothing may be added in between:
    a unit is constant whichever of both is pruned only if silu(0) * up and silu(gate) * 0 are.
    """
    ends = [nodes[name] for name in coupling.producers]
    consumer = nodes[coupling.consumer]
    found: list[ir.Node] = []

    def visit(value: ir.Value | None) -> None:
        node = None if value is None else value.producer()
        if node is None or node in found or node in ends or vector(value) is not None:
            return
        unknown = node.op_type not in _ELEMENTWISE or (node.op_type == "Add" and len(ends) > 1)
        if unknown or node.attributes.get_string("approximate", "none") not in _GELUS:
            raise ExportError(
                f"{node.op_type} {node.name} lies between {coupling.producers} and "
                f"{coupling.consumer}; the pass follows {sorted(_ELEMENTWISE)} only"
            )
        for item in node.inputs:
            visit(item)
        found.append(node)

    visit(consumer.inputs[0])
    _require_private(ends, found, consumer, coupling)
    return found


def _require_private(
    ends: list[ir.Node], hidden: list[ir.Node], consumer: ir.Node, coupling: Coupling
) -> None:
    """Refuse layers that are no MatMul and hidden units that others use as well."""
    if any(node.op_type != "MatMul" for node in (*ends, consumer)):
        raise ExportError(f"{coupling.producers} and {coupling.consumer} must be MatMul nodes")
    inside = {*hidden, consumer}
    for node in (*ends, *hidden):
        users = {use.node for use in node.outputs[0].uses()}
        if not users <= inside or node.outputs[0].is_graph_output():
            raise ExportError(
                f"hidden units of {coupling.consumer} are also used by "
                f"{sorted(str(user.name) for user in users - inside) or 'the graph'}"
            )


def _constants(
    nodes: Mapping[str, ir.Node], coupling: Coupling, hidden: Iterable[ir.Node]
) -> _Units:
    """Return what each unit puts out where its producers put out 0.  float64 [units]"""
    values: dict[ir.Value | None, _Units] = {
        nodes[name].outputs[0]: np.zeros(coupling.units) for name in coupling.producers
    }
    for node in hidden:
        inputs = [
            values[item] if item in values else _required_vector(item) for item in node.inputs
        ]
        compute = _ELEMENTWISE[node.op_type]
        if node.op_type == "Gelu":
            compute = _GELUS[node.attributes.get_string("approximate", "none")]
        values[node.outputs[0]] = compute(*inputs)
    return values[nodes[coupling.consumer].inputs[0]]


def _reorder(graph: ir.Graph, hidden: Iterable[ir.Node], coupling: Coupling, units: int) -> None:
    """Take the units that stay out of the constants and shapes between producers and consumer.

    What units that fill up put out does not matter: the consumer's weights of them are 0.
    """
    for node in hidden:
        _narrow(node.outputs[0], units)
        for index, value in enumerate(node.inputs):
            constant = vector(value)
            if constant is not None and constant.size == coupling.units:
                kept = np.pad(constant[coupling.order], (0, units - len(coupling.order)))
                name = f"{coupling.consumer}.hidden.{node.name}"
                node.replace_input_with(index, register(graph, ir.Tensor(kept, name=name)))


def _narrow(value: ir.Value, units: int) -> None:
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape[:-1], units])


def _required_vector(value: ir.Value | None) -> NDArray[Any]:
    constant = vector(value)
    if constant is None:
        raise ExportError(f"{value} is neither a hidden unit nor a constant vector")
    return constant
