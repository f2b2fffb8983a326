"""Pass: nodes that work for one layer are named after it, so that a runtime's report tells whom
its time went to; see `qvla_export.shared.node_names`."""

from collections import Counter
from collections.abc import Set

import onnx_ir as ir

from qvla_export.shared.node_names import LayerNode, node_name, parse_constant_name

# Between a constant and the node that computes with it.
_CARRIERS = ("Cast", "DequantizeLinear", "Transpose", "Reshape")


def name_nodes(model: ir.Model) -> None:
    """Name nodes in place by the constants they read; a Concat by what it joins.

    The products of one bucket bear its width. Others keep their names.
    """
    named: dict[ir.Node, LayerNode] = {}
    taken: Counter[str] = Counter()
    fixed = _fixed_nodes(model)
    for node in model.graph:
        found = None if _is_carrier(node) else _layer_of(node, named, fixed)
        if found is None:
            continue
        named[node] = found
        name = node_name(found.layer, found.bits, found.op_type)
        taken[name] += 1
        node.name = name if taken[name] == 1 else f"{name}_{taken[name]}"


def _is_carrier(node: ir.Node) -> bool:
    return node.op_type in _CARRIERS and _constant_of(node.inputs[0]) is not None


def _layer_of(
    node: ir.Node, named: dict[ir.Node, LayerNode], fixed: Set[ir.Node]
) -> LayerNode | None:
    for value in node.inputs:
        found = _owner_of(value, fixed)
        if found is not None:
            # Only a product reads a bucket's codes; an Add behind it serves the layer.
            layer, bits = found
            return LayerNode(layer, bits, node.op_type)
    if node.op_type != "Concat":
        return None
    sources = {named.get(producer) for producer in _producers(node)}
    layers = {source.layer for source in sources if source is not None}
    return LayerNode(layers.pop(), None, "Concat") if len(layers) == 1 else None


def _producers(node: ir.Node) -> list[ir.Node]:
    producers = (None if value is None else value.producer() for value in node.inputs)
    return [producer for producer in producers if producer is not None]


def _owner_of(value: ir.Value | None, fixed: Set[ir.Node]) -> tuple[str, int | None] | None:
    """Return layer and width of the constant behind a value; see `_constant_of`.

    Codes that were expanded and joined are of a layer and of no width.
    """
    constant = _constant_of(value)
    if constant is not None:
        return parse_constant_name(constant)
    producer = None if value is None else value.producer()
    if producer is None or producer not in fixed:
        return None
    if producer.op_type in (*_CARRIERS, "QuantizeLinear"):
        return _owner_of(producer.inputs[0], fixed)
    if producer.op_type == "Gather":
        # One member's columns of a matrix that layers share.
        return _owner_of(producer.inputs[1], fixed)
    if producer.op_type != "Concat":
        return None
    owners = {_owner_of(joined, fixed) for joined in producer.inputs}
    return next(((owner[0], None) for owner in owners if owner is not None), None)


def _fixed_nodes(model: ir.Model) -> set[ir.Node]:
    """Return the nodes that compute from constants alone, as runtimes do once.

    In the graph's order: asked of one node after another, a network of many blocks would be walked
    back from each, deeper than Python recurses.
    """
    fixed: set[ir.Node] = set()
    for node in model.graph:
        if all(
            value is not None and (value.is_initializer() or value.producer() in fixed)
            for value in node.inputs
        ):
            fixed.add(node)
    return fixed


def _constant_of(value: ir.Value | None) -> str | None:
    """Return the name of the constant behind a value, through casts and dequantization."""
    while value is not None:
        if value.is_initializer():
            return value.name
        producer = value.producer()
        if producer is None or producer.op_type not in _CARRIERS:
            return None
        value = producer.inputs[0]
    return None
