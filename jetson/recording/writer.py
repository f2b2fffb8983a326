"""Write a run to MCAP on a thread of its own: the robot never waits for the disk.

What does not fit into the queue is dropped and counted. Once a second what was written becomes a
complete chunk of the file, so a recorder that is killed leaves a readable file that lacks at most
its last second. A long recording goes on in further files (`McapFiles`).
"""

import base64
import io
import json
import logging
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from jetson.board import BoardState
from jetson.errors import RefusedSetting
from jetson.recording.mcap_files import McapFiles
from jetson.recording.queue import DropQueue, QueuedWrite
from jetson.recording.schemas import BOARD, IMAGES, STEP, Images
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.request_observer import ServedRequest
from qvla_export.shared.artifacts import versions
from qvla_export.shared.observation import Observation
from qvla_export.shared.recorded_messages import (
    ACTION,
    CAMERA,
    COMPLETE,
    FORMAT,
    OBSERVATION,
)

if TYPE_CHECKING:
    from jetson.control.chunks import TimedChunk
    from jetson.control.records import StepRecord
    from jetson.control.sources import TimedObservation

_LOG = logging.getLogger(__name__)
_FLUSH_S = 1.0
_BOARD_S = 5.0
# What no disk takes that works; and what is waited for one when a recording ends.
_STUCK_S = 30.0
_CLOSING_S = 30.0
_JPEG_QUALITY = 95
# In camera pictures only neighbours repeat: a third less time than searching, no more bytes.
_PNG_STRATEGY = zlib.Z_RLE
# What an event costs beside its arrays.
_EVENT_BYTES = 1024


class McapRecorder:
    """An `Observer` of `qvla serve` and a `Recorder` of `qvla run`. A context manager."""

    def __init__(
        self,
        path: Path,
        contract: PolicyContract,
        board: Callable[[], BoardState],
        source: str,
        images: Images = "png",
        max_pending_bytes: int = 64 << 20,
    ) -> None:
        """Create the file and say in it what is recorded.

        Args:
            path: to write; must not exist. What does not fit goes on in files numbered after it.
            contract: of the policy, with the digest of its bundle.
            board: returns the newest sample.
            source: "serve" or "run".
            images: "png" is lossless, so that a replay sees what the policy saw; "jpeg" (quality
                95, 4:4:4) takes a fifth of the space and changes what a replay sees.
            max_pending_bytes: of events that wait for the disk; more are dropped.

        Raises:
            RefusedSetting: the file exists or cannot be made, or `images` is something else.
        """
        if images not in IMAGES:
            raise RefusedSetting(f"images are recorded as one of {list(IMAGES)}, got {images!r}")
        self.path = path
        # Events written so far.
        self.written = 0
        self._images: Images = images
        self._board = board
        self._queue = DropQueue(max_pending_bytes)
        self._failure: Exception | None = None
        self._told = False
        # When the work that is under way began; None while there is none.
        self._began_s: float | None = None
        self._last_ns = 0
        self._time_lock = threading.Lock()
        # When the loop's newest observation was taken -> the log time it was given.
        self._observed: tuple[float, int] = (-1.0, 0)
        about = {
            "format": FORMAT,
            "source": source,
            "images": images,
            "bundle_digest": contract.bundle_digest,
            "target": contract.target,
            "contract": json.dumps(contract.to_json()),
            "versions": json.dumps(versions()),
        }
        self._files = McapFiles(path, about)
        self._thread = threading.Thread(target=self._work, name="qvla-recorder", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Events that were not recorded because the disk could not follow, or failed."""
        return self._queue.dropped

    @property
    def failure(self) -> str | None:
        """Why nothing is recorded any more; None while it is."""
        if self._failure is not None:
            return f"{type(self._failure).__name__}: {self._failure}"
        began_s = self._began_s
        if began_s is not None and (stuck_s := time.monotonic() - began_s) > _STUCK_S:
            return f"nothing could be written for {stuck_s:.0f} s: the disk does not answer"
        return None if self._thread.is_alive() else "the recorder has ended"

    def on_request(self, served: ServedRequest) -> None:
        """Keep one request of a server: what was seen and what came of it, both or neither."""
        if served.observation is None:
            return  # nothing to replay, and strangers could fill the disk
        seen_ns = self._now_ns()
        observation, reason = served.observation, "" if served.error is None else str(served.error)
        actions = None if served.chunk is None else served.chunk.actions
        normalized = None if served.chunk is None else served.chunk.normalized
        timing_ms = dict(served.timing_ms)

        def write() -> None:
            self._write_observation(observation, seen_ns)
            self._write_action(seen_ns, seen_ns, actions, normalized, timing_ms, reason)

        self._put(write, observation)

    def on_observation(self, observation: "TimedObservation") -> None:
        """Keep an observation that the control loop asks about."""
        seen_ns = self._now_ns()
        self._observed = observation.observed_s, seen_ns
        seen = observation.observation
        self._put(lambda: self._write_observation(seen, seen_ns), seen)
        self._say_once()

    def on_chunk(self, chunk: "TimedChunk") -> None:
        """Keep the actions that came of one."""
        now_ns, (observed_s, seen_ns) = self._now_ns(), self._observed
        origin = seen_ns if observed_s == chunk.observed_s else None
        self._put(
            lambda: self._write_action(now_ns, origin, chunk.actions, None, chunk.timing_ms, "")
        )
        self._say_once()

    def on_step(self, record: "StepRecord") -> None:
        """Keep the record of a slot."""
        now_ns = self._now_ns()
        value = {**asdict(record), "state": record.state.value}
        value["age_ms"], value["late_ms"] = record.age_ms, record.late_ms
        self._put(lambda: self._files.write(STEP, STEP, now_ns, value))
        self._say_once()

    def close(self) -> None:
        """Write what is waiting and complete the file, unless the disk does not answer."""
        self._queue.close()
        self._thread.join(_CLOSING_S)
        if self._thread.is_alive():
            _LOG.error("%s is not complete: the disk does not answer", self.path)
        if self.dropped:
            _LOG.warning("%s lacks %d events: the disk could not follow", self.path, self.dropped)

    def __enter__(self) -> "McapRecorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _now_ns(self) -> int:
        """Return the time, always later than before: it is what tells observations apart."""
        with self._time_lock:
            self._last_ns = max(self._last_ns + 1, time.time_ns())
            return self._last_ns

    def _put(self, write: Callable[[], None], observation: Observation | None = None) -> None:
        images = () if observation is None else observation.images.values()
        self._queue.put(QueuedWrite(write, _EVENT_BYTES + sum(image.nbytes for image in images)))

    def _say_once(self) -> None:
        """Let the control loop hear of a failure once; what comes later is counted."""
        if self._failure is not None and not self._told:
            self._told = True
            raise self._failure

    def _work(self) -> None:
        flushed_s = time.monotonic()
        sampled_s = flushed_s - _BOARD_S
        event: QueuedWrite | None = None
        try:
            while True:
                self._began_s = None
                event = self._queue.take(_FLUSH_S)
                self._began_s = now_s = time.monotonic()
                if now_s - sampled_s >= _BOARD_S:
                    sampled_s = now_s
                    self._files.write(BOARD, BOARD, self._now_ns(), self._board().to_json())
                if event is not None:
                    event.write()
                    self.written += 1
                    event = None
                elif self._queue.is_done:
                    break
                if now_s - flushed_s >= _FLUSH_S:
                    flushed_s = now_s
                    self._files.flush(self._counts())
            self._files.end(COMPLETE, self._counts())
        except Exception as error:  # whatever a disk or an encoder says, the robot goes on
            _LOG.error("%s: the rest is not recorded: %s", self.path, error)
            self._failure = error
            self._queue.fail(int(event is not None))
            # There may be room for a last word, or the failure was not the disk's.
            with suppress(Exception):
                self._files.end(f"{type(error).__name__}: {error}", self._counts())
        finally:
            self._began_s = None
            self._files.close()

    def _counts(self) -> dict[str, str]:
        return {"written": str(self.written), "dropped": str(self.dropped)}

    def _write_observation(self, observation: Observation, seen_ns: int) -> None:
        for name, image in observation.images.items():
            picture = {
                "timestamp": {"sec": seen_ns // 10**9, "nsec": seen_ns % 10**9},
                "frame_id": name,
                "data": base64.b64encode(encode_image(image, self._images)).decode(),
                "format": self._images,
            }
            self._files.write(CAMERA + name, CAMERA, seen_ns, picture)
        value = {
            "cameras": list(observation.images),
            "instruction": observation.instruction,
            "state": observation.state.tolist(),
            "dropped": self.dropped,
        }
        self._files.write(OBSERVATION, OBSERVATION, seen_ns, value)

    def _write_action(
        self,
        log_ns: int,
        observation_ns: int | None,
        actions: NDArray[Any] | None,
        normalized: NDArray[Any] | None,
        timing_ms: Mapping[str, float],
        error: str,
    ) -> None:
        value = {
            "observation_ns": observation_ns,
            "actions": [] if actions is None else actions.tolist(),
            "normalized": [] if normalized is None else normalized.tolist(),
            "timing_ms": dict(timing_ms),
            "error": error,
        }
        self._files.write(ACTION, ACTION, log_ns, value)


def encode_image(image: NDArray[np.uint8], form: Images) -> bytes:
    """Return a picture uint8 [h, w, 3] as a PNG or JPEG file."""
    if form == "jpeg":
        encoded: bytes = simplejpeg.encode_jpeg(
            np.ascontiguousarray(image), quality=_JPEG_QUALITY, colorsubsampling="444"
        )
        return encoded
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1, compress_type=_PNG_STRATEGY)
    return buffer.getvalue()
