"""json-numpy arrays without trust: base64 bytes, a plain numeric dtype and a shape that agree.

The format is that of the `json_numpy` package 2.1 and of both OpenVLA servers:
`{"__numpy__": base64, "dtype": "|u1", "shape": [h, w, 3]}`. Its `object_hook` believes every
field; here all three are checked before any memory is taken. No pickle, no object arrays.
"""

import binascii
import math
import re
from typing import Any

import json_numpy
import numpy as np
from numpy.typing import NDArray

from jetson.errors import WireError

# Byte order, kind (bool, signed, unsigned, float) and bytes; nothing structured, no objects.
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])", re.ASCII)
_MAX_DIMENSIONS = 8


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


def _dtype(value: Any, name: str) -> np.dtype[Any]:
    if not isinstance(value, str) or not _DTYPE.fullmatch(value):
        raise WireError(
            f"{name!r}: dtype must be a plain number such as '|u1' or '<f4', got {value!r:.60}"
        )
    return np.dtype(value)


def _shape(value: Any, name: str) -> tuple[int, ...]:
    sizes = value if isinstance(value, list) else None
    if (
        sizes is None
        or len(sizes) > _MAX_DIMENSIONS
        or any(type(size) is not int or size < 0 or size >= 1 << 31 for size in sizes)
    ):
        raise WireError(
            f"{name!r}: shape must be a list of at most {_MAX_DIMENSIONS} sizes "
            f"in 0..2^31-1, got {value!r:.60}"
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
