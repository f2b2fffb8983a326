"""Arrays as the protocols spell them, decoded without trust.

    json-numpy   {"__numpy__": base64, "dtype": "|u1", "shape": [h, w, 3]}          OpenVLA, OFT
    packed       {b"__ndarray__": true, b"data", b"dtype", b"shape"}, as msgpack    openpi
    npy          the bytes of `np.save`                                             GR00T
    tagged       {"__ndarray__": true, "data", "dtype", "shape"}, or a picture's file
                 {"__image__": true, "format": "png" | "jpeg" | "raw", "data", "shape"}  vla-eval

Upstream's decoders believe every field; here a plain numeric dtype, a shape and as many bytes as
they need must agree before any memory is taken. No pickle, no object arrays, no `ast`.
Sources: `json_numpy` 2.1; `openpi_client.msgpack_numpy`; numpy's `numpy.lib.format`; vla-eval 0.8.0
`protocol/numpy_codec.py` and `image_codec.py`.
"""

import binascii
import io
import math
import re
from typing import Any

import json_numpy
import numpy as np
from numpy.typing import NDArray

from jetson.errors import WireError
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import brief
from qvla_export.shared.pictures.picture_bounds import opened_picture

# Byte order, kind (bool, signed, unsigned, float) and bytes; nothing structured, no objects.
_KINDS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
_DTYPES: dict[str, np.dtype[Any]] = {
    order + kind: np.dtype(order + kind) for order in ("", *"<>|=") for kind in _KINDS
}
_MAX_DIMENSIONS = 8
# What np.save writes before the data; the alignment's spaces and the newline follow.
_NPY_HEADER = re.compile(
    rb"\{'descr': '([^']{2,3})', 'fortran_order': (True|False), "
    rb"'shape': \(((?:\d{1,10},? ?){0,8})\), \}\s*"
)
_NPY_MAGIC = b"\x93NUMPY"
# What vla-eval's clients compress pictures to, and Pillow's names of it.
_PICTURES = {"png": ("PNG",), "jpeg": ("JPEG",)}


def encode_array(array: NDArray[Any]) -> dict[str, Any]:
    """Return an array as the JSON object that `json_numpy` reads."""
    encoded: dict[str, Any] = json_numpy.default(array)
    return encoded


def decode_array(value: Any, name: str) -> NDArray[Any]:
    """Return the array that a json-numpy object holds; `name` says which in the errors.

    Raises:
        WireError: it is no json-numpy object, the dtype is not a plain number, or the bytes
            are not base64 or not as many as the shape says.
    """
    if not isinstance(value, dict) or "__numpy__" not in value:
        raise WireError(
            f"{name!r} must be a json-numpy array, got {type(value).__name__}; "
            "call json_numpy.patch() in the client"
        )
    dtype, shape = _dtype(value.get("dtype"), name), _shape(value.get("shape"), name)
    size_bytes = math.prod(shape) * dtype.itemsize
    return np.frombuffer(_bytes(value["__numpy__"], size_bytes, name), dtype).reshape(shape)


def encode_packed(array: NDArray[Any]) -> dict[bytes, Any]:
    """Return an array as the map that `openpi_client.msgpack_numpy` reads."""
    return {
        b"__ndarray__": True,
        b"data": array.tobytes(),
        b"dtype": array.dtype.str,
        b"shape": array.shape,
    }


def decode_packed(value: Any, name: str) -> NDArray[Any]:
    """Return the array that such a map holds, without copying; read-only.

    Raises:
        WireError: it is no such map, or dtype, shape and bytes do not agree.
    """
    if not isinstance(value, dict) or b"__ndarray__" not in value:
        raise WireError(
            f"{name!r} must be an array packed by openpi_client.msgpack_numpy, "
            f"got {type(value).__name__}"
        )
    dtype, shape = _dtype(value.get(b"dtype"), name), _shape(value.get(b"shape"), name)
    return _view(value.get(b"data"), dtype, shape, name)


def encode_npy(array: NDArray[Any]) -> bytes:
    """Return an array as the bytes of `np.save`."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def decode_npy(data: Any, name: str) -> NDArray[Any]:
    """Return the array that the bytes of `np.save` hold, without copying; read-only.

    Raises:
        WireError: the header is not one that np.save writes for plain numbers, or it promises
            another number of bytes than there are.
    """
    if not isinstance(data, bytes) or data[:6] != _NPY_MAGIC or data[6:8] not in (b"\1\0", b"\2\0"):
        raise WireError(f"{name!r} must be the bytes of np.save, got {brief(data)}")
    # Version 1 counts its header in two bytes, version 2 in four.
    first = 10 if data[6] == 1 else 12
    end = first + int.from_bytes(data[8:first], "little")
    header = _NPY_HEADER.fullmatch(data[first : min(end, first + 1000)])
    if header is None:
        raise WireError(
            f"{name!r}: the npy header must be np.save's for plain numbers, "
            f"got {data[first : min(end, first + 80)]!r}"
        )
    sizes = [int(size) for size in re.findall(rb"\d+", header[3])]
    dtype, shape = _dtype(header[1].decode("latin-1"), name), _shape(sizes, name)
    if header[2] == b"True":
        return _view(data[end:], dtype, shape[::-1], name).transpose()
    return _view(data[end:], dtype, shape, name)


def encode_tagged(array: NDArray[Any]) -> dict[str, Any]:
    """Return an array as the map that vla-eval's clients read."""
    shape = list(array.shape)
    return {
        "__ndarray__": True,
        "data": array.tobytes(),
        "dtype": array.dtype.str,
        "shape": shape,
    }


def decode_tagged(value: Any, name: str) -> NDArray[Any]:
    """Return the array or the picture that such a map holds; read-only.

    A compressed picture keeps the channels it has: who sends grey gets no colours here.

    Raises:
        WireError: it is no such map, dtype, shape and bytes do not agree, or a picture is damaged
            or no camera's.
    """
    if not isinstance(value, dict) or not ("__ndarray__" in value or "__image__" in value):
        raise WireError(
            f"{name!r} must be an array as vla-eval packs one, got {type(value).__name__}"
        )
    shape = _shape(value.get("shape"), name)
    picture = value.get("format", "raw") if "__image__" in value else "raw"
    if picture == "raw":
        return _view(value.get("data"), _dtype(value.get("dtype"), name), shape, name)
    formats, data = _PICTURES.get(picture) if isinstance(picture, str) else None, value.get("data")
    if formats is None or not isinstance(data, bytes):
        raise WireError(
            f"{name!r}: a picture is the bytes of a raw, {' or '.join(_PICTURES)} one, got "
            f"{type(data).__name__} of format {brief(picture)}"
        )
    try:
        with opened_picture(data, repr(name), formats) as image:
            image.load()
            pixels = np.asarray(image)
    except ArtifactError as error:
        raise WireError(str(error)) from None
    if pixels.shape != shape:
        raise WireError(f"{name!r}: the picture is {list(pixels.shape)}, its shape {list(shape)}")
    return pixels


def _view(data: Any, dtype: np.dtype[Any], shape: tuple[int, ...], name: str) -> NDArray[Any]:
    size_bytes = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != size_bytes:
        got = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"{name!r}: dtype and shape need {size_bytes} bytes, got {got}")
    return np.frombuffer(data, dtype).reshape(shape)


def _dtype(value: Any, name: str) -> np.dtype[Any]:
    dtype = _DTYPES.get(value) if isinstance(value, str) else None
    if dtype is None:
        raise WireError(
            f"{name!r}: dtype must be a plain number such as '|u1' or '<f4', got {brief(value)}"
        )
    return dtype


def _shape(value: Any, name: str) -> tuple[int, ...]:
    sizes = value if isinstance(value, list) else None
    if (
        sizes is None
        or len(sizes) > _MAX_DIMENSIONS
        or any(type(size) is not int or size < 0 for size in sizes)
        # Beside a size of 0, others that no array could have would fit as well.
        or math.prod(size for size in sizes if size) >= 1 << 31
    ):
        raise WireError(
            f"{name!r}: shape must be a list of at most {_MAX_DIMENSIONS} sizes of fewer than "
            f"2^31 elements, got {brief(value)}"
        )
    return tuple(sizes)


def _bytes(text: Any, size_bytes: int, name: str) -> bytes:
    # The text's length is checked first: a wrong one costs no memory, and characters that the
    # lenient decoder skips cannot hide, as the decoded length would then be short.
    expected = 4 * -(-size_bytes // 3)
    if not isinstance(text, str) or len(text) != expected:
        got = f"{len(text)} characters" if isinstance(text, str) else type(text).__name__
        raise WireError(
            f"{name!r}: dtype and shape need {size_bytes} bytes, {expected} characters of base64; "
            f"got {got}"
        )
    try:
        data = binascii.a2b_base64(text)
    except ValueError as error:  # binascii.Error, or a character outside ASCII
        raise WireError(f"{name!r}: '__numpy__' is not base64: {error}") from None
    if len(data) != size_bytes:
        raise WireError(
            f"{name!r}: '__numpy__' holds {len(data)} bytes where dtype and shape need {size_bytes}"
        )
    return data
