"""Artifacts that are one safetensors file: tensors, and provenance with a checksum. numpy only.

Files are written from the tensors where they lie, and read one tensor at a time: some are as large
as a bound of memory allows.
"""

import hashlib
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np
import safetensors
from numpy.typing import NDArray

from qvla_export.shared.artifacts import write_pieces
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.git_lfs import refuse_pointer
from qvla_export.shared.json_documents import parse_document

Tensors = Mapping[str, NDArray[Any]]


_REMEDY = "make it anew"


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Any]]


_Parts = TypeVar("_Parts", bound=_Dataclass)


class TensorArtifact(ABC):
    """What is kept as one file, and known by the file's digest."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file that `save` writes; what is made from this records it."""
        digest = hashlib.sha256()
        for piece in _pieces(self._tensors(), self._provenance()):
            digest.update(piece)
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write safetensors with the provenance as metadata, atomically."""
        write_tensor_file(path, self._tensors(), self._provenance())

    @abstractmethod
    def _tensors(self) -> Tensors:
        """Return what the file holds."""

    @abstractmethod
    def _provenance(self) -> Mapping[str, Any]:
        """Return the format and all that is no tensor; JSON."""


def layer_tensors(layers: Mapping[str, Any]) -> Tensors:
    """Return the arrays of layers by "<layer>/<field>".

    Args:
        layers: layer name -> dataclass of arrays; a field that is None is left out.
    """
    if isinstance(layers, StoredLayers):
        return layers.tensors
    return {
        f"{name}/{part.name}": getattr(layer, part.name)
        for name, layer in layers.items()
        for part in fields(layer)
        if getattr(layer, part.name) is not None
    }


def layers_of(tensors: Tensors, names: Iterable[str], kind: type[_Parts]) -> dict[str, _Parts]:
    """Return layers from what `layer_tensors` made of them.

    Args:
        tensors: by "<layer>/<field>".
        names: of the layers, in order.
        kind: their dataclass; fields that have a default may be missing.

    Raises:
        KeyError: a tensor is missing.
    """
    parts = fields(kind)
    found = {}
    for name in names:
        given = {
            part.name: tensors[f"{name}/{part.name}"]
            for part in parts
            if part.default is MISSING or f"{name}/{part.name}" in tensors
        }
        found[name] = kind(**given)
    return found


class StoredTensors(Mapping[str, NDArray[Any]]):
    """Tensors of a file, each read on demand; see `open_tensor_file`."""

    def __init__(self, path: Path, places: Mapping[str, "_Place"]) -> None:
        self._path = path
        self._places = places

    def __getitem__(self, name: str) -> NDArray[Any]:
        place = self._places[name]
        values = np.fromfile(self._path, place.dtype, place.count, offset=place.offset)
        if len(values) != place.count:
            raise ArtifactError(f"{self._path} was cut short while it was in use; make it anew")
        return values.reshape(place.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._places[name].shape


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its file."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    offset: int

    @property
    def count(self) -> int:
        """How many numbers."""
        return math.prod(self.shape)


class StoredLayers(Mapping[str, _Parts]):
    """Layers of a file that `layer_tensors` filled, each read on demand."""

    def __init__(self, tensors: Tensors, names: Iterable[str], kind: type[_Parts]) -> None:
        self.tensors = tensors
        self._names = tuple(names)
        self._kind = kind

    def __getitem__(self, name: str) -> _Parts:
        if name not in self._names:
            raise KeyError(name)
        return layers_of(self.tensors, [name], self._kind)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def write_tensor_file(path: Path, tensors: Tensors, provenance: Mapping[str, Any]) -> None:
    """Write a safetensors file whose one metadata entry holds provenance and checksum, atomically.

    One entry, because safetensors writes several in random order; equal content gives equal bytes.
    """
    write_pieces(path, _pieces(tensors, provenance))


def read_tensor_file(
    path: Path, form: str, what: str, remedy: str = _REMEDY
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the tensors and the provenance of a file that `write_tensor_file` made.

    Args: as in `open_tensor_file`.

    Raises:
        ArtifactError: the file is missing, truncated, damaged or not of the format `form`.
    """
    stored, provenance = open_tensor_file(path, form, what, remedy)
    return dict(stored), provenance


def open_tensor_file(
    path: Path, form: str, what: str, remedy: str = _REMEDY
) -> tuple[StoredTensors, dict[str, Any]]:
    """Check a file that `write_tensor_file` made; return its tensors, unread, and the provenance.

    Args:
        path: the file.
        form: format that its provenance must name.
        what: the artifact in words, for messages.
        remedy: what messages tell the user to do.

    Raises:
        ArtifactError: the file is missing, truncated, damaged or not of the format `form`.
    """
    if not path.is_file():
        raise ArtifactError(f"{what} not found: {path}")
    try:
        with safetensors.safe_open(path, "numpy"):
            pass  # its header and size are right
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = parse_document(file.read(length), "the header")
        provenance = parse_document(
            header.pop("__metadata__", {}).get("qvla", "{}"), "the provenance"
        )
        if not isinstance(provenance, dict):
            raise ValueError("the provenance is no object")
        places = {
            name: _Place(
                _DTYPES[entry["dtype"]],
                tuple(entry["shape"]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in header.items()
        }
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        refuse_pointer(path)
        raise ArtifactError(
            f"{what} {path}: truncated or damaged file ({error}); {remedy}"
        ) from error
    if provenance.get("format") != form:
        raise ArtifactError(f"{path} holds no {what} of format {form}; {remedy}")
    stored = StoredTensors(path, places)
    if provenance.get("sha256") != _looked_through(stored)[0]:
        raise ArtifactError(f"{what} {path}: the checksum is wrong, the file is damaged; {remedy}")
    return stored, provenance


# In the order in which safetensors lays tensors out, last first; of one type they are by name.
_DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "I16": np.int16,
        "U16": np.uint16,
        "F16": np.float16,
        "I32": np.int32,
        "U32": np.uint32,
        "F32": np.float32,
        "F64": np.float64,
        "I64": np.int64,
        "U64": np.uint64,
    }.items()
}


def _pieces(tensors: Tensors, provenance: Mapping[str, Any]) -> Iterator[bytes | memoryview]:
    """Yield the bytes that safetensors would write, header first, without a copy of the tensors."""
    checksum, kinds = _looked_through(tensors)
    value = {**provenance, "sha256": checksum}
    ranks = {name: rank for rank, name in enumerate(_DTYPES)}
    names = {dtype: name for name, dtype in _DTYPES.items()}
    order = sorted(kinds, key=lambda name: (-ranks[names[kinds[name].dtype]], name))
    header: dict[str, Any] = {"__metadata__": {"qvla": json.dumps(value)}}
    end = 0
    for name in order:
        kind, start = kinds[name], end
        end += kind.count * kind.dtype.itemsize
        header[name] = {
            "dtype": names[kind.dtype],
            "shape": list(kind.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        yield _bytes_of(tensors[name])


def _looked_through(tensors: Tensors) -> tuple[str, dict[str, _Place]]:
    """Return a checksum of the tensors, and what each is; each is looked at once."""
    digest, kinds = hashlib.sha256(), {}
    for name in sorted(tensors):
        values = tensors[name]
        kinds[name] = _Place(values.dtype, values.shape, 0)
        digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
        digest.update(_bytes_of(values))
    return digest.hexdigest(), kinds


def _bytes_of(values: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
