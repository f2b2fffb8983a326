"""Read a recording, also one whose recorder was killed or whose file is damaged.

Everything up to the first damage is read; nothing in a file is believed before it was checked.
"""

import base64
import binascii
import io
import json
import logging
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import zstandard
from mcap.exceptions import McapError
from mcap.records import Channel, Chunk, McapRecord, Message, Metadata
from mcap.stream_reader import StreamReader, breakup_chunk
from numpy.typing import NDArray
from PIL import Image

from jetson.errors import WireError
from jetson.recording.schemas import ABOUT, ACTION, CAMERA, END, FORMAT, OBSERVATION
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactError, InvalidObservation, QvlaError
from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)
_MAX_RECORD_BYTES = 256 << 20
_MAX_PIXELS = 64_000_000
# Observations that wait for their action; a loop asks about one after the other.
_MAX_WAITING = 16
# What the mcap library and the decompressor raise over damaged bytes.
_DAMAGE = (McapError, ValueError, struct.error, zstandard.ZstdError, EOFError)


@dataclass(frozen=True)
class Moment:
    """One observation and what the policy made of it when it was recorded."""

    # Nanoseconds since 1970.
    time_ns: int
    observation: Observation
    # None where there was no action. Its `normalized` is empty where only `actions` were known.
    chunk: ActionChunk | None
    # Why not; empty where there was one.
    error: str


class Recording:
    """One file: what it says of itself, and its moments.

    Raises:
        ArtifactError: it is not there, or is no recording of this format.
    """

    def __init__(self, path: Path) -> None:
        """Read what the file says of itself."""
        self.path = path
        about = next((r for r in self._records() if isinstance(r, Metadata)), None)
        if about is None or about.name != ABOUT or about.metadata.get("format") != FORMAT:
            raise ArtifactError(
                f"{path} is not a recording of format {FORMAT!r}; make one with "
                "qvla serve --record FILE.mcap or qvla run --record FILE.mcap"
            )
        # As `McapRecorder` wrote it: source, images, bundle_digest, versions, ...
        self.about = dict(about.metadata)
        try:
            self.contract = PolicyContract.from_json(json.loads(self.about["contract"]))
        except (KeyError, ValueError, WireError) as error:
            raise ArtifactError(f"{path} does not say which policy acted: {error}") from None
        # Events written and dropped; None where the recorder was killed. Known after `moments`.
        self.counts: dict[str, int] | None = None

    @property
    def lossless(self) -> bool:
        """Whether the pictures are exactly those the policy saw."""
        return self.about.get("images") == "png"

    def moments(self) -> Iterator[Moment]:
        """Return the observations with their actions, in the order in which they were answered.

        Raises:
            ArtifactError: a message contradicts its schema.
        """
        topics: dict[int, str] = {}
        pictures: dict[int, dict[str, NDArray[np.uint8]]] = {}
        waiting: dict[int, Observation] = {}
        for record in self._records():
            if isinstance(record, Channel):
                topics[record.id] = record.topic
            elif isinstance(record, Metadata) and record.name == END:
                self.counts = {k: int(v) for k, v in record.metadata.items() if v.isdecimal()}
            elif isinstance(record, Message):
                topic, time_ns = topics.get(record.channel_id, ""), record.log_time
                try:
                    if topic.startswith(CAMERA):
                        name = topic.removeprefix(CAMERA)
                        _drop_oldest(pictures).setdefault(time_ns, {})[name] = _picture(record.data)
                    elif topic == OBSERVATION:
                        seen = _observation(record.data, pictures.pop(time_ns, {}))
                        _drop_oldest(waiting)[time_ns] = seen
                    elif topic == ACTION:
                        moment = _moment(record.data, time_ns, waiting)
                        if moment is not None:
                            yield moment
                except (KeyError, TypeError, ValueError, RecursionError) as error:
                    raise ArtifactError(
                        f"{self.path}: a message on {topic!r} contradicts its schema: {error}"
                    ) from None

    def observations(self, limit: int = 256) -> list[Observation]:
        """Return the first observations that got an action, as a profile sends them.

        Raises:
            ArtifactError: there is none, or a message contradicts its schema.
        """
        found = []
        for moment in self.moments():
            if moment.chunk is not None:
                found.append(moment.observation)
            if len(found) == limit:
                break
        if not found:
            raise ArtifactError(f"{self.path} holds no observation that got an action")
        return found

    def _records(self) -> Iterator[McapRecord]:
        """Return the records up to the end, or to where the file is damaged."""
        try:
            file = self.path.open("rb")
        except OSError as error:
            raise ArtifactError(f"the recording {self.path} cannot be read: {error}") from None
        with file:
            reader = StreamReader(file, emit_chunks=True, record_size_limit=_MAX_RECORD_BYTES)
            records = iter(reader.records)
            while True:
                try:
                    record = next(records, None)
                    inside = _unpack(record) if isinstance(record, Chunk) else [record]
                except _DAMAGE as error:
                    reason = f"{type(error).__name__} {error}".strip()
                    _LOG.warning("%s ends early (%s); what precedes is read", self.path, reason)
                    return
                for one in inside:
                    if one is None:
                        return
                    yield one


def _unpack(chunk: Chunk) -> list[McapRecord]:
    if chunk.compression not in ("", "zstd"):
        raise ValueError(f"compression {chunk.compression!r}; convert it with: mcap compress")
    size = len(chunk.data)
    if chunk.compression:
        # The frame's own word is what would be allocated.
        size = zstandard.frame_content_size(chunk.data)
    if size != chunk.uncompressed_size or size > _MAX_RECORD_BYTES:
        raise ValueError(f"a chunk of {size} bytes where {chunk.uncompressed_size} are announced")
    return breakup_chunk(chunk, validate_crc=True)


def _drop_oldest(waiting: dict[int, Any]) -> dict[int, Any]:
    while len(waiting) >= _MAX_WAITING:
        del waiting[next(iter(waiting))]
    return waiting


def _picture(data: bytes) -> NDArray[np.uint8]:
    message = json.loads(data)
    try:
        encoded = base64.b64decode(message["data"], validate=True)
    except binascii.Error as error:
        raise ValueError(f"base64: {error}") from None
    if message["format"] == "jpeg":
        height, width, *_ = simplejpeg.decode_jpeg_header(encoded)
        _check_pixels(width, height)
        decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(encoded, "RGB")
        return decoded
    try:
        with Image.open(io.BytesIO(encoded), formats=("PNG",)) as image:
            _check_pixels(*image.size)
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"picture: {error}") from None


def _check_pixels(width: int, height: int) -> None:
    if width * height > _MAX_PIXELS:
        raise ValueError(f"a picture of {width}x{height}, at most {_MAX_PIXELS} pixels are read")


def _observation(data: bytes, pictures: dict[str, NDArray[np.uint8]]) -> Observation:
    message = json.loads(data)
    images = {name: pictures[name] for name in message["cameras"]}
    try:
        state = np.asarray(message["state"], np.float32)
        return Observation(images, message["instruction"], state)
    except InvalidObservation as error:
        raise ValueError(str(error)) from None


def _moment(data: bytes, time_ns: int, waiting: dict[int, Observation]) -> Moment | None:
    """Return what an action message completes; None where its observation is not known."""
    message = json.loads(data)
    seen = waiting.pop(message["observation_ns"], None)
    if seen is None:
        return None
    error = str(message["error"])
    if error:
        return Moment(time_ns, seen, None, error)
    actions = np.asarray(message["actions"], np.float32)
    normalized = np.asarray(message.get("normalized") or np.zeros((0, 0)), np.float32)
    if actions.ndim != 2 or not np.isfinite(actions).all() or not np.isfinite(normalized).all():
        raise QvlaError(f"actions must be finite [horizon, dim], got {list(actions.shape)}")
    timing_ms = {str(span): float(ms) for span, ms in message["timing_ms"].items()}
    return Moment(time_ns, seen, ActionChunk(actions, normalized, timing_ms), "")
