"""Where the graphs of an ONNX file say that their weights lie; read without onnx.

A runtime opens whatever file a graph names. So a bundle's graphs are looked through before: the
messages of `onnx.proto` that can hold a tensor are walked in the protocol buffer wire format
(https://protobuf.dev/programming-guides/encoding), everything else is skipped unread.
"""

import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from qvla_export.shared.errors import ArtifactError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
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


class _DamagedMessage(Exception):
    """The bytes are no message."""


def external_tensors(path: Path) -> list[ExternalTensor]:
    """Return every tensor of an ONNX file that lies outside it.

    Raises:
        ArtifactError: the file is no ONNX model, or nests deeper than 64 messages.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return list(_walk(data, (0, len(data)), "ModelProto", 0))
    except (_DamagedMessage, ValueError, OSError) as error:
        raise ArtifactError(
            f"{path} is no ONNX model: {error}; copy the bundle again or export it anew"
        ) from None


def _walk(
    data: mmap.mmap, span: tuple[int, int], kind: str, depth: int
) -> Iterator[ExternalTensor]:
    if depth > _MAX_DEPTH:
        raise _DamagedMessage(f"messages nest deeper than {_MAX_DEPTH}")
    if kind == "TensorProto":
        yield from _tensor(data, span)
        return
    for number, inner in _fields(data, span):
        if number in _FIELDS[kind]:
            yield from _walk(data, inner, _FIELDS[kind][number], depth + 1)


def _tensor(data: mmap.mmap, span: tuple[int, int]) -> Iterator[ExternalTensor]:
    name, entries = "", {}
    for number, inner in _fields(data, span):
        if number == _TENSOR_NAME:
            name = _text(data, inner)
        elif number == _TENSOR_EXTERNAL:
            pair = {n: _text(data, part) for n, part in _fields(data, inner)}
            entries[pair.get(1, "")] = pair.get(2, "")
    if entries:
        offset, length = (entries.get(key, "0") for key in ("offset", "length"))
        if not (offset.isdecimal() and length.isdecimal() and len(offset + length) < 40):
            raise _DamagedMessage(f"tensor {name[:80]!r} lies at {offset[:40]!r}+{length[:40]!r}")
        yield ExternalTensor(name, entries.get("location", ""), int(offset), int(length))


def _fields(data: mmap.mmap, span: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
    """Yield number and place of each field of bytes; numbers are passed over."""
    at, end = span
    while at < end:
        key, at = _varint(data, at, end)
        number, wire = key >> 3, key & 7
        size = 0
        if wire == _VARINT:
            _, at = _varint(data, at, end)
        elif wire == _BYTES:
            size, at = _varint(data, at, end)
        elif wire in (_FIXED64, _FIXED32):
            size = 8 if wire == _FIXED64 else 4
        else:
            raise _DamagedMessage(f"field {number} has the unknown wire type {wire}")
        if at + size > end:
            raise _DamagedMessage("a field ends behind its message")
        if wire == _BYTES:
            yield number, (at, at + size)
        at += size


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise _DamagedMessage("a number does not end")


def _text(data: mmap.mmap, span: tuple[int, int]) -> str:
    return data[span[0] : span[1]].decode("utf-8", "replace")
