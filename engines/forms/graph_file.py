"""The noun `GraphFile`: nodes and constants of an ONNX file, read and changed without onnx.

What is not looked at is copied byte for byte. Field numbers are those of `onnx.proto`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

from engines.base import EngineError
from qvla_export.shared.protobuf import (
    BYTES,
    VARINT,
    DamagedMessage,
    Span,
    bytes_field,
    number_field,
    read_fields,
    read_text,
    read_varint,
)

_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_CONSTANT = 1, 5
_NODE_INPUT, _NODE_OUTPUT, _NODE_NAME, _NODE_KIND, _NODE_ATTRIBUTE, _NODE_DOMAIN = 1, 2, 3, 4, 5, 7
_ATTRIBUTE_NAME, _ATTRIBUTE_NUMBER, _ATTRIBUTE_KIND = 1, 3, 20
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 1, 2, 8, 9
_INT_ATTRIBUTE = 2
FLOAT, INT64 = 1, 7
# Types that hold several weights a byte: 4 and 2 bits, unsigned and signed.
_BITS = {21: 4, 22: 4, 25: 2, 26: 2}
NARROW = frozenset(_BITS)
_BYTES = {1: 4, 2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 12: 4, 13: 8, 16: 2}


@dataclass(frozen=True)
class GraphNode:
    """One node."""

    op_type: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    # Whole-number attributes by name; the others are in `stored` only.
    numbers: Mapping[str, int] = field(default_factory=dict)
    # The node as it lies in the file; empty for one that is new.
    stored: bytes = b""

    def to_bytes(self) -> bytes:
        """Return the node as a field of a graph."""
        if self.stored:
            return bytes_field(_GRAPH_NODE, self.stored)
        parts = [bytes_field(_NODE_INPUT, name) for name in self.inputs]
        parts += [bytes_field(_NODE_OUTPUT, name) for name in self.outputs]
        parts += [bytes_field(_NODE_NAME, self.name), bytes_field(_NODE_KIND, self.op_type)]
        for name, value in self.numbers.items():
            content = bytes_field(_ATTRIBUTE_NAME, name)
            content += number_field(_ATTRIBUTE_NUMBER, value)
            content += number_field(_ATTRIBUTE_KIND, _INT_ATTRIBUTE)
            parts.append(bytes_field(_NODE_ATTRIBUTE, content))
        return bytes_field(_GRAPH_NODE, b"".join(parts))


@dataclass(frozen=True)
class Constant:
    """One constant, without its values."""

    name: str
    # Number of `TensorProto.DataType`.
    dtype: int
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values in memory; narrow codes packed."""
        count = prod(self.shape)
        if self.dtype in _BITS:
            return -(-count * _BITS[self.dtype] // 8)
        return count * _BYTES.get(self.dtype, 4)


@dataclass(frozen=True)
class GraphFile:
    """An ONNX file, or one that was changed."""

    nodes: tuple[GraphNode, ...]
    constants: Mapping[str, Constant]
    # All other fields of the graph and of the model, one after the other.
    graph_rest: bytes = field(repr=False)
    model_rest: bytes = field(repr=False)

    @staticmethod
    def read(path: Path) -> "GraphFile":
        """Read a file's nodes and constants; values of weights may lie in other files.

        Raises:
            EngineError: it is no ONNX model.
        """
        try:
            return _read(path.read_bytes())
        except (DamagedMessage, OSError) as error:
            raise EngineError(
                f"{path} is no ONNX model: {error}; copy the bundle again or export it anew"
            ) from None

    def with_nodes(self, nodes: Sequence[GraphNode], constants: Iterable[bytes]) -> "GraphFile":
        """Return it with other nodes, in the order given, and more constants."""
        added = b"".join(bytes_field(_GRAPH_CONSTANT, tensor) for tensor in constants)
        return GraphFile(tuple(nodes), self.constants, self.graph_rest + added, self.model_rest)

    def to_bytes(self) -> bytes:
        """Return the file."""
        graph = b"".join(node.to_bytes() for node in self.nodes) + self.graph_rest
        return self.model_rest + bytes_field(_MODEL_GRAPH, graph)


def whole_numbers(name: str, values: Sequence[int]) -> bytes:
    """Return a constant of whole numbers of at least 0, int64 [n], as `with_nodes` takes it."""
    raw = b"".join(value.to_bytes(8, "little") for value in values)
    return (
        number_field(_TENSOR_DIMS, len(values))
        + number_field(_TENSOR_TYPE, INT64)
        + bytes_field(_TENSOR_NAME, name)
        + bytes_field(_TENSOR_RAW, raw)
    )


def _read(data: bytes) -> GraphFile:
    rest, graph = b"", None
    for found in read_fields(data, (0, len(data))):
        if found.number == _MODEL_GRAPH and found.wire == BYTES:
            graph = found.content
        else:
            rest += data[slice(*found.span)]
    if graph is None:
        raise DamagedMessage("it has no graph")
    nodes, constants, others = [], {}, []
    for found in read_fields(data, graph):
        if found.wire == BYTES and found.number == _GRAPH_NODE:
            nodes.append(_node(data, found.content))
            continue
        if found.wire == BYTES and found.number == _GRAPH_CONSTANT:
            constant = _constant(data, found.content)
            constants[constant.name] = constant
        others.append(data[slice(*found.span)])
    return GraphFile(tuple(nodes), constants, b"".join(others), rest)


def _node(data: bytes, span: Span) -> GraphNode:
    texts: dict[int, list[str]] = {}
    numbers: dict[str, int] = {}
    for found in read_fields(data, span):
        if found.number == _NODE_ATTRIBUTE and found.wire == BYTES:
            numbers |= _attribute(data, found.content)
        elif found.wire == BYTES:
            texts.setdefault(found.number, []).append(read_text(data, found.content))
    kind = "".join(texts.get(_NODE_KIND, []))
    domain = "".join(texts.get(_NODE_DOMAIN, []))
    return GraphNode(
        f"{domain}.{kind}" if domain else kind,
        "".join(texts.get(_NODE_NAME, [])),
        tuple(texts.get(_NODE_INPUT, [])),
        tuple(texts.get(_NODE_OUTPUT, [])),
        numbers,
        data[slice(*span)],
    )


def _attribute(data: bytes, span: Span) -> dict[str, int]:
    name, value = "", None
    for found in read_fields(data, span):
        if found.number == _ATTRIBUTE_NAME and found.wire == BYTES:
            name = read_text(data, found.content)
        elif found.number == _ATTRIBUTE_NUMBER and found.wire == VARINT:
            value = read_varint(data, *found.content)[0]
    return {} if value is None else {name: value}


def _constant(data: bytes, span: Span) -> Constant:
    name, dtype, shape = "", 0, []
    for found in read_fields(data, span):
        if found.number == _TENSOR_NAME and found.wire == BYTES:
            name = read_text(data, found.content)
        elif found.number == _TENSOR_TYPE and found.wire == VARINT:
            dtype = read_varint(data, *found.content)[0]
        elif found.number == _TENSOR_DIMS and found.wire == VARINT:
            shape.append(read_varint(data, *found.content)[0])
        elif found.number == _TENSOR_DIMS and found.wire == BYTES:  # packed
            at, end = found.content
            while at < end:
                size, at = read_varint(data, at, end)
                shape.append(size)
    return Constant(name, dtype, tuple(shape))
