"""Change a graph so that some layers' weights become float32 when it is loaded.

A runtime keeps DequantizeLinear before a product, to multiply codes. The same numbers from a Cast
and a Mul it computes once, and multiplies floats: four bytes a weight, and for some layers faster.
"""

from collections.abc import Collection, Iterator, Mapping

from engines.forms.graph_file import FLOAT, GraphFile, GraphNode, whole_numbers
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.node_names import parse_node_name

# Part of a bundle -> layers of it whose weights are float32 in memory.
FloatLayers = Mapping[str, Collection[str]]
_SUFFIX = ".in_float"


def all_layers(bundle: Bundle) -> FloatLayers:
    """Return every layer of a bundle whose weights its graphs dequantize, by part."""
    found = {p.name: layers_of(GraphFile.read(bundle.model_path(p))) for p in bundle.parts}
    return {part: frozenset(layers) for part, layers in found.items() if layers}


def form_of(float_layers: FloatLayers) -> str:
    """Say how many layers are float, in words; nothing where none is."""
    count = count_layers(float_layers)
    return f"{count} layers in float" if count else ""


def count_layers(float_layers: FloatLayers) -> int:
    """Return how many layers are float, over all parts."""
    return sum(len(layers) for layers in float_layers.values())


def layers_of(graph: GraphFile) -> tuple[str, ...]:
    """Return the layers whose weights a graph dequantizes, in order, by the names of nodes."""
    return tuple(dict.fromkeys(layer for layer, _ in _weights(graph)))


def with_float_layers(graph: GraphFile, layers: Collection[str]) -> GraphFile:
    """Return a graph in which the weights of some layers are float32 once it is loaded.

    Args:
        graph: of a bundle for ONNX Runtime on a CPU, so that scales are float32.
        layers: names as in `layers_of`; others change nothing.
    """
    wanted = {node.outputs[0] for layer, node in _weights(graph) if layer in layers}
    nodes: list[GraphNode] = []
    constants: dict[str, bytes] = {}
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and node.outputs[0] in wanted:
            nodes += _in_float(graph, node, constants)
        else:
            nodes.append(node)
    return graph.with_nodes(nodes, constants.values())


def _weights(graph: GraphFile) -> Iterator[tuple[str, GraphNode]]:
    """Yield every layer's DequantizeLinear that can be float: its weight is a constant."""
    fixed = set(graph.constants)
    dequantized: dict[str, GraphNode] = {}
    for node in graph.nodes:
        if node.inputs and all(name in fixed or not name for name in node.inputs):
            fixed.update(node.outputs)
            if node.op_type == "DequantizeLinear" and _is_known(graph, node):
                dequantized[node.outputs[0]] = node
        elif node.op_type == "MatMul" and node.inputs[1] in dequantized:
            named = parse_node_name(node.name)
            if named is not None:
                yield named.layer, dequantized[node.inputs[1]]


def _is_known(graph: GraphFile, node: GraphNode) -> bool:
    """Say whether its scales are one a column, or one a column and block of stored rows."""
    if not node.numbers.get("block_size"):
        return node.numbers.get("axis", 1) == 1
    return node.numbers.get("axis", 1) == 0 and node.inputs[0] in graph.constants


def _in_float(graph: GraphFile, node: GraphNode, constants: dict[str, bytes]) -> list[GraphNode]:
    """Return nodes that compute what a DequantizeLinear does; constants gets what they read."""
    out = node.outputs[0]
    codes, scale, *zeros = (name for name in node.inputs if name)
    names = {role: f"{out}.{role}{_SUFFIX}" for role in ("codes", "zeros", "moved")}
    nodes = [_node(node, "Cast", (codes,), names["codes"], to=FLOAT)]
    # ONNX Runtime gathers no codes of 4 bits, so zero points are floats first.
    nodes += [_node(node, "Cast", (name,), names["zeros"], to=FLOAT) for name in zeros]
    factors = [scale, *(names["zeros"] for _ in zeros)]
    block = node.numbers.get("block_size", 0)
    if block:
        rows = graph.constants[codes].shape[0]
        index = f"rows_of_{rows}_by_{block}{_SUFFIX}"
        constants[index] = whole_numbers(index, [row // block for row in range(rows)])
        repeated = [f"{out}.{place}{_SUFFIX}" for place in range(len(factors))]
        nodes += [
            _node(node, "Gather", (factor, index), name, axis=0)
            for factor, name in zip(factors, repeated, strict=True)
        ]
        factors = repeated
    value = names["codes"]
    if zeros:
        nodes.append(_node(node, "Sub", (value, factors[1]), names["moved"]))
        value = names["moved"]
    return [*nodes, _node(node, "Mul", (value, factors[0]), out)]


def _node(
    source: GraphNode, op_type: str, inputs: tuple[str, ...], output: str, **numbers: int
) -> GraphNode:
    return GraphNode(op_type, f"{source.name}/{output}/{op_type}", inputs, (output,), numbers)
