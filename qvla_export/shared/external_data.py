"""Where the graphs of an ONNX file say that their weights lie; read without onnx.

A runtime opens whatever file a graph names. So a bundle's graphs are looked through before: the
messages of `onnx.proto` that can hold a tensor are walked, everything else is skipped unread.
"""

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.protobuf import BYTES, DamagedMessage, Span, read_fields, read_text

# Message -> number of a field -> message that it holds; only what leads to a tensor.
_FIELDS: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
        "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
        "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
        "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
        "NodeProto": {5: "AttributeProto"},
        "AttributeProto": {
            5: "TensorProto",
            6: "GraphProto",
            10: "TensorProto",
            11: "GraphProto",
            22: "SparseTensorProto",
            23: "SparseTensorProto",
        },
        "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    }
)
_TENSOR_NAME, _TENSOR_EXTERNAL = 8, 13
_MAX_DEPTH = 64


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose values lie in another file."""

    name: str
    # As the graph names the file, relative to its own folder.
    location: str
    offset: int
    # 0 where the graph does not say.
    length: int


def external_tensors(path: Path) -> list[ExternalTensor]:
    """Return every tensor of an ONNX file that lies outside it.

    Raises:
        ArtifactError: the file is no ONNX model, or nests deeper than 64 messages.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return list(_walk(data, (0, len(data)), "ModelProto", 0))
    except (DamagedMessage, ValueError, OSError) as error:
        raise ArtifactError(
            f"{path} is no ONNX model: {error}; copy the bundle again or export it anew"
        ) from None


def _walk(data: mmap.mmap, span: Span, kind: str, depth: int) -> Iterator[ExternalTensor]:
    if depth > _MAX_DEPTH:
        raise DamagedMessage(f"messages nest deeper than {_MAX_DEPTH}")
    if kind == "TensorProto":
        yield from _tensor(data, span)
        return
    for number, inner in _contents(data, span):
        if number in _FIELDS[kind]:
            yield from _walk(data, inner, _FIELDS[kind][number], depth + 1)


def _tensor(data: mmap.mmap, span: Span) -> Iterator[ExternalTensor]:
    name, entries = "", {}
    for number, inner in _contents(data, span):
        if number == _TENSOR_NAME:
            name = read_text(data, inner)
        elif number == _TENSOR_EXTERNAL:
            pair = {n: read_text(data, part) for n, part in _contents(data, inner)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if entries:
        offset, length = (entries.get(key, "0") for key in ("offset", "length"))
        if not (offset.isdecimal() and length.isdecimal() and len(offset + length) < 40):
            raise DamagedMessage(f"tensor {name[:80]!r} lies at {offset[:40]!r}+{length[:40]!r}")
        yield ExternalTensor(name, entries.get("location", ""), int(offset), int(length))


def _contents(data: mmap.mmap, span: Span) -> Iterator[tuple[int, Span]]:
    """Yield number and place of each field of bytes; numbers are passed over."""
    for field in read_fields(data, span):
        if field.wire == BYTES:
            yield field.number, field.content
