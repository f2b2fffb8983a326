"""Messages of our recordings, as `jetson/recording/schemas.py` describes them: bytes to nouns."""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import InvalidObservation, QvlaError
from qvla_export.shared.json_documents import parse_document
from qvla_export.shared.observation import Observation
from qvla_export.shared.pictures.picture_bounds import picture_fault

FORMAT = "qvla.recording/1"
# Names of the metadata records.
ABOUT = "qvla"
END = "qvla.end"
# How a recording ended that lacks nothing.
COMPLETE = "complete"
# Topics; cameras' names follow theirs.
CAMERA = "/camera/"
OBSERVATION = "/observation"
ACTION = "/action"


def read_message(data: bytes) -> dict[str, Any]:
    """Return a message's JSON object.

    Raises:
        ValueError: it is none.
    """
    value = parse_document(data, "a message is not valid JSON")
    if not isinstance(value, dict):
        raise ValueError("a message is no JSON object")
    return value


def read_picture(data: bytes) -> NDArray[np.uint8]:
    """Return the picture of a camera's message.  uint8 [h, w, 3]

    Raises:
        KeyError, TypeError, ValueError: the message contradicts its schema.
    """
    message = read_message(data)
    try:
        encoded = base64.b64decode(message["data"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"base64: {error}") from None
    if message["format"] == "jpeg":
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
        _require_bounds(width, height)
        decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB")
        return decoded
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            _require_bounds(*image.size)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture: {error}") from None


def _require_bounds(width: int, height: int) -> None:
    if fault := picture_fault(width, height):
        raise ValueError(fault)


def observation_of(
    message: Mapping[str, Any], pictures: Mapping[str, NDArray[np.uint8]]
) -> Observation:
    """Return the observation of a message with the pictures of its cameras.

    Raises:
        KeyError, TypeError, ValueError: the message contradicts its schema, or lacks a picture.
    """
    images = {name: pictures[name] for name in message["cameras"]}
    try:
        state = np.asarray(message["state"], np.float32)
        return Observation(images, message["instruction"], state)
    except InvalidObservation as error:
        raise ValueError(str(error)) from None


def action_of(message: Mapping[str, Any]) -> ActionChunk:
    """Return the actions of a message that states no error.

    Raises:
        KeyError, TypeError, ValueError: the message contradicts its schema.
    """
    actions = np.asarray(message["actions"], np.float32)
    normalized = np.asarray(message.get("normalized") or np.zeros((0, 0)), np.float32)
    if actions.ndim != 2 or not np.isfinite(actions).all() or not np.isfinite(normalized).all():
        raise QvlaError(f"actions must be finite [horizon, dim], got {list(actions.shape)}")
    timing_ms = {str(span): float(ms) for span, ms in message["timing_ms"].items()}
    return ActionChunk(actions, normalized, timing_ms)
