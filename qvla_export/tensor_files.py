"""Artifacts that are one safetensors file: tensors, and provenance with a checksum. numpy only."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import safetensors
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from qvla_export.artifacts import write_bytes
from qvla_export.errors import ArtifactError

Tensors = Mapping[str, NDArray[Any]]
_Parts = TypeVar("_Parts")


class TensorArtifact(ABC):
    """What is kept as one file, and known by the file's digest."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file that `save` writes; what is made from this records it."""
        return hashlib.sha256(tensor_file(self._tensors(), self._provenance())).hexdigest()

    def save(self, path: Path) -> None:
        """Write safetensors with the provenance as metadata, atomically."""
        write_bytes(path, tensor_file(self._tensors(), self._provenance()))

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
        TypeError: `kind` is no dataclass.
    """
    # The checker takes no bare type for a dataclass; `fields` raises if it is none.
    parts: tuple[Any, ...] = fields(kind)  # type: ignore[arg-type]
    found = {}
    for name in names:
        given = {
            part.name: tensors[f"{name}/{part.name}"]
            for part in parts
            if part.default is MISSING or f"{name}/{part.name}" in tensors
        }
        found[name] = kind(**given)
    return found


def tensor_file(tensors: Tensors, provenance: Mapping[str, Any]) -> bytes:
    """Return a safetensors file whose one metadata entry holds provenance and checksum.

    One entry, because safetensors writes several in random order; equal content gives equal bytes.
    """
    contiguous = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    value = {**provenance, "sha256": _checksum(contiguous)}
    return save_tensors(contiguous, {"qvla": json.dumps(value)})


def read_tensor_file(
    path: Path, form: str, what: str
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    """Return the tensors and the provenance of a file that `tensor_file` made.

    Raises:
        ArtifactError: the file is missing, truncated, damaged or not of the format `form`.
    """
    if not path.is_file():
        raise ArtifactError(f"{what} not found: {path}")
    try:
        data = path.read_bytes()
        tensors = load_tensors(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{what} {path}: truncated or damaged file ({error}); make it anew"
        ) from error
    provenance = json.loads(header.get("__metadata__", {}).get("qvla", "{}"))
    if provenance.get("format") != form:
        raise ArtifactError(f"{path} holds no {what} of format {form}; make it anew")
    if provenance.get("sha256") != _checksum(tensors):
        raise ArtifactError(f"{what} {path}: the checksum is wrong, the file is damaged; remake it")
    return tensors, provenance


def _checksum(tensors: Tensors) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}\n".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()
