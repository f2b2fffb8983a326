"""Images and states of many observations in one safetensors file; one's content as bytes."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

_IMAGES = "images/"


def content(observation: Observation) -> bytes:
    """Return all that an observation says, as digests are made of it."""
    images = [f"{n}{i.shape}".encode() + i.tobytes() for n, i in observation.images.items()]
    rest = observation.state.tobytes() + observation.instruction.encode() + b"\0"
    return b"".join([*images, rest])


def content_digest(observation: Observation) -> bytes:
    """Return the SHA-256 of an observation's content."""
    return hashlib.sha256(content(observation)).digest()


def pack(observations: Sequence[Observation]) -> bytes:
    """Return a safetensors file of images uint8 [n, h, w, 3] by camera and states float32 [n, d].

    Raises:
        QvlaError: observations differ in cameras, image size or state.
    """
    first = observations[0]
    if any(list(o.images) != list(first.images) for o in observations):
        raise QvlaError(f"all observations must have the cameras {list(first.images)}")
    columns: dict[str, list[NDArray[Any]]] = {"state": [o.state for o in observations]}
    for name in first.images:
        columns[_IMAGES + name] = [o.images[name] for o in observations]
    tensors: dict[str, NDArray[Any]] = {}
    for name, arrays in columns.items():
        shapes = {array.shape for array in arrays}
        if len(shapes) != 1:
            what = f"images of camera {name.removeprefix(_IMAGES)!r}" if "/" in name else "states"
            raise QvlaError(f"{what} must have one size, got {sorted(shapes)}")
        tensors[name] = np.stack(arrays)
    return save_tensors(tensors)


def unpack(data: bytes, cameras: Sequence[str], instructions: Sequence[str]) -> list[Observation]:
    """Return the observations of a file, with the instructions that lie beside it.

    Raises:
        SafetensorError, KeyError, IndexError: the file is damaged or of other cameras.
    """
    tensors = load_tensors(data)
    images = {name: tensors[_IMAGES + name] for name in cameras}
    return [
        Observation({n: c[i] for n, c in images.items()}, text, tensors["state"][i])
        for i, text in enumerate(instructions)
    ]
