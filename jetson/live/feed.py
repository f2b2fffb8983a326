"""The noun `LiveFeed`: the newest action and the latencies before it, for the page.

Taking note of an action keeps references and one number; pictures are made smaller and encoded
only when a page asks for them.
"""

import threading
import time
from collections import Counter, deque
from collections.abc import Callable
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
        # The newest request with an action, and when it was answered.
        self._latest: tuple[int, float, ServedRequest] | None = None
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
            self._latest = self._count, now_s, served
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
        if latest is None or latest[2].observation is None:
            return None
        images = list(latest[2].observation.images.values())
        return preview(images[index]) if 0 <= index < len(images) else None


def preview(image: NDArray[np.uint8]) -> bytes:
    """Return a picture uint8 [h, w, 3] as a JPEG with no side longer than 360 pixels."""
    height, width = image.shape[:2]
    # Every n-th pixel first: a preview is not worth filtering a 4K frame.
    step = max(1, max(height, width) // (2 * _PREVIEW_SIDE))
    frame = Image.fromarray(np.ascontiguousarray(image[::step, ::step]))
    frame.thumbnail((_PREVIEW_SIDE, _PREVIEW_SIDE), Image.Resampling.BILINEAR)
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(np.asarray(frame)), quality=_JPEG_QUALITY, colorsubsampling="420"
    )
    return encoded


def _latest_json(latest: tuple[int, float, ServedRequest], now_s: float) -> dict[str, Any]:
    number, answered_s, served = latest
    observation, chunk = served.observation, served.chunk
    assert observation is not None and chunk is not None
    return {
        "number": number,
        "age_s": round(now_s - answered_s, 2),
        "instruction": observation.instruction[:_MAX_TEXT],
        "cameras": [
            {"name": name[:_MAX_TEXT], "width": image.shape[1], "height": image.shape[0]}
            for name, image in observation.images.items()
        ],
        "state": [round(float(value), 4) for value in observation.state],
        "actions": [[round(float(value), 5) for value in row] for row in chunk.actions],
        "timing_ms": {name: round(ms, 3) for name, ms in served.timing_ms.items()},
    }


def _failure_json(failed: tuple[float, str, str], now_s: float) -> dict[str, Any]:
    failed_s, kind, message = failed
    return {"age_s": round(now_s - failed_s, 1), "kind": kind, "message": message[:_MAX_TEXT]}
