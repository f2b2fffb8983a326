"""The noun `LiveFeed`: the newest action and the latencies before it, for the page.

Taking note of an action keeps references and one number, and of a picture much larger than the
page shows every n-th pixel; pictures are encoded only when a page asks for them.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from jetson.board import BoardState
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.request_observer import ServedRequest
from qvla_export.shared.normalization import Bounds

# Actions that the latency strip shows.
RECENT = 120
_PREVIEW_SIDE = 360
_JPEG_QUALITY = 80
_MAX_TEXT = 2000


@dataclass(frozen=True)
class _Newest:
    """The newest request with an action."""

    number: int
    answered_s: float
    # Its pictures are no larger than a preview needs: nobody knows when the next ones come.
    served: ServedRequest
    # Width and height of each picture as it was sent.
    sizes: list[tuple[int, int]]


class LiveFeed:
    """An `Observer` that a page can ask what is going on. Thread-safe."""

    def __init__(
        self,
        contract: PolicyContract,
        board: Callable[[], BoardState],
        limits: Bounds | None = None,
        deadline_ms: float | None = None,
        recording: Callable[[], dict[str, Any] | None] = lambda: None,
        loop: Callable[[], dict[str, Any] | None] = lambda: None,
    ) -> None:
        """Start with nothing seen.

        Args:
            contract: of the policy that is served.
            board: returns the newest sample.
            limits: of its actions; None where they are not known.
            deadline_ms: what an action may take; None draws no line.
            recording: returns the file and counts of a recording, or None.
            loop: returns the newest slot of a control loop, or None.
        """
        self._contract = contract
        self._board = board
        self._limits = None if limits is None else [limits.low.tolist(), limits.high.tolist()]
        self._deadline_ms = deadline_ms
        self._recording = recording
        self._loop = loop
        self._start_s = time.monotonic()
        self._lock = threading.Lock()
        self._count = 0
        self._misses = 0
        self._errors: Counter[str] = Counter()
        self._latest: _Newest | None = None
        self._failed: tuple[float, str, str] | None = None
        self._recent_ms: deque[float] = deque(maxlen=RECENT)

    def on_request(self, served: ServedRequest) -> None:
        """Take note of one request."""
        now_s, error = time.monotonic(), served.error
        with self._lock:
            if error is not None:
                kind = type(error).__name__
                self._errors[kind] += 1
                # Strangers that are sent away are counted; the operator is told of the robot.
                if served.timing_ms:
                    self._failed = now_s, kind, str(error)
                return
            total_ms = served.timing_ms["total"]
            self._count += 1
            self._latest = _newest(self._count, now_s, served)
            self._recent_ms.append(total_ms)
            if self._deadline_ms is not None and total_ms > self._deadline_ms:
                self._misses += 1

    def snapshot(self) -> dict[str, Any]:
        """Return what the page shows, as JSON values; texts are the clients' and not escaped."""
        now_s = time.monotonic()
        with self._lock:
            latest, failed = self._latest, self._failed
            recent_ms, errors = list(self._recent_ms), dict(self._errors)
            counts = {"actions": self._count, "misses": self._misses, "errors": errors}
        return {
            "policy": self._contract.to_json(),
            "uptime_s": round(now_s - self._start_s, 1),
            "counts": counts,
            "limits": self._limits,
            "deadline_ms": self._deadline_ms,
            "recent_ms": [round(ms, 3) for ms in recent_ms],
            "latest": None if latest is None else _latest_json(latest, now_s),
            "failed": None if failed is None else _failure_json(failed, now_s),
            "board": self._board().to_json(),
            "recording": self._recording(),
            "loop": self._loop(),
        }

    def picture(self, index: int) -> bytes | None:
        """Return a JPEG preview of the newest action's camera; None where there is none."""
        latest = self._latest
        if latest is None or latest.served.observation is None:
            return None
        images = list(latest.served.observation.images.values())
        return preview(images[index]) if 0 <= index < len(images) else None


def preview(image: NDArray[np.uint8]) -> bytes:
    """Return a picture uint8 [h, w, 3] as a JPEG with no side longer than 360 pixels."""
    frame = Image.fromarray(np.ascontiguousarray(_thinned(image)))
    frame.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE), Image.Resampling.BILINEAR)
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.asarray(frame)), quality=_JPEG_QUALITY, colorsubsampling="420"
    )
    return encoded


def _thinned(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return every n-th pixel: a preview is not worth filtering a 4K frame."""
    step = max(1, max(image.shape[:2]) // (2 * _PREVIEW_SIDE))
    return image[::step, ::step]


def _newest(number: int, answered_s: float, served: ServedRequest) -> _Newest:
    observation = served.observation
    assert observation is not None
    images = observation.images
    sizes = [(image.shape[1], image.shape[0]) for image in images.values()]
    thinned = {name: _thinned(image) for name, image in images.items()}
    if any(thinned[name].shape != image.shape for name, image in images.items()):
        copies = {name: np.ascontiguousarray(image) for name, image in thinned.items()}
        served = replace(served, observation=replace(observation, images=copies))
    return _Newest(number, answered_s, served, sizes)


def _latest_json(latest: _Newest, now_s: float) -> dict[str, Any]:
    observation, chunk = latest.served.observation, latest.served.chunk
    assert observation is not None and chunk is not None
    return {
        "number": latest.number,
        "age_s": round(now_s - latest.answered_s, 2),
        "instruction": observation.instruction[:_MAX_TEXT],
        "cameras": [
            {"name": name[:_MAX_TEXT], "width": width, "height": height}
            for name, (width, height) in zip(observation.images, latest.sizes, strict=True)
        ],
        "state": [round(float(value), 4) for value in observation.state],
        "actions": [[round(float(value), 5) for value in row] for row in chunk.actions],
        "timing_ms": {name: round(ms, 3) for name, ms in latest.served.timing_ms.items()},
    }


def _failure_json(failed: tuple[float, str, str], now_s: float) -> dict[str, Any]:
    failed_s, kind, message = failed
    return {"age_s": round(now_s - failed_s, 1), "kind": kind, "message": message[:_MAX_TEXT]}
