"""Cameras through OpenCV (V4L2 on Linux): the newest frame of each, with the time it was taken.

OpenCV comes with the extra `camera`; without it, everything else works.
"""

import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jetson.control.loop_clock import LoopClock
from jetson.control.sources import TimedObservation
from jetson.errors import RefusedSetting
from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)
_REOPEN_S = 1.0


class Capture(Protocol):
    """What is used of `cv2.VideoCapture`."""

    def grab(self) -> bool:
        """Wait for the next frame; False if there is none."""
        ...

    def retrieve(self) -> tuple[bool, Any]:
        """Decode the frame that was grabbed last: BGR uint8 [h, w, 3]."""
        ...

    def release(self) -> None:
        """Close the device."""
        ...


class CameraSource:
    """One thread a camera grabs frames as they come; a camera that fails is opened again."""

    def __init__(
        self,
        cameras: Mapping[str, Callable[[], Capture]],
        instruction: str,
        clock: LoopClock,
        state: Callable[[], NDArray[np.float32]] | None = None,
    ) -> None:
        """Open the cameras.

        Args:
            cameras: name -> opens it; raises RefusedSetting if it cannot be opened.
            instruction: what the policy should do.
            clock: of the loop; frames are stamped with it.
            state: returns the robot's proprioceptive state, where the policy takes one.

        Raises:
            RefusedSetting: a camera cannot be opened.
        """
        self._clock = clock
        self._instruction = instruction
        self._state = state
        self._lock = threading.Lock()
        self._closed = threading.Event()
        # Camera -> its newest frame and when that was taken.
        self._frames: dict[str, tuple[float, NDArray[np.uint8]]] = {}
        self._names = tuple(cameras)
        opened = {name: opener() for name, opener in cameras.items()}
        self._threads = [
            threading.Thread(
                target=self._watch, args=(name, opened[name], cameras[name]), daemon=True
            )
            for name in cameras
        ]
        for thread in self._threads:
            thread.start()

    def read(self) -> TimedObservation | None:
        """Return the newest frames, as old as the oldest of them; None before the first."""
        with self._lock:
            if len(self._frames) < len(self._names):
                return None
            frames = {name: self._frames[name] for name in self._names}
        images = {name: image for name, (_, image) in frames.items()}
        observed_s = min(taken_s for taken_s, _ in frames.values())
        if self._state is None:
            return TimedObservation(Observation(images, self._instruction), observed_s)
        return TimedObservation(Observation(images, self._instruction, self._state()), observed_s)

    @property
    def is_over(self) -> bool:
        """A camera never ends."""
        return False

    def close(self) -> None:
        """Release the cameras."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=2.0)

    def _watch(self, name: str, capture: Capture | None, opener: Callable[[], Capture]) -> None:
        while not self._closed.is_set():
            if capture is None:
                self._closed.wait(_REOPEN_S)
                capture = _reopen(name, opener)
            elif not self._grab(name, capture):
                _LOG.warning("camera %s gives no frames; opening it again", name)
                capture.release()
                capture = None
        if capture is not None:
            capture.release()

    def _grab(self, name: str, capture: Capture) -> bool:
        if not capture.grab():
            return False
        # Before decoding: a frame is as old as its exposure, not as its last copy.
        taken_s = self._clock.now_s()
        decoded, frame = capture.retrieve()
        if not decoded:
            return False
        image = np.ascontiguousarray(frame[:, :, ::-1])
        with self._lock:
            self._frames[name] = taken_s, image
        return True


def open_camera(device: str) -> Capture:
    """Open a camera by path (`/dev/video0`) or number, or a video file or stream by its name.

    Raises:
        RefusedSetting: OpenCV is missing, or it cannot open the device.
    """
    try:
        import cv2
    except ImportError:
        raise RefusedSetting("cameras need OpenCV: pip install 'qvla[camera]'") from None
    place: str | int = int(device) if device.isdecimal() else device
    local = isinstance(place, int) or device.startswith("/dev/")
    capture = cv2.VideoCapture(place, cv2.CAP_V4L2 if local else cv2.CAP_ANY)
    if not capture.isOpened():
        raise RefusedSetting(
            f"cannot open the camera {device!r}: is it connected, free, and readable by you? "
            "`v4l2-ctl --list-devices` lists what is there"
        )
    # Frames that wait in a queue are old.
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)
    return capture


def _reopen(name: str, opener: Callable[[], Capture]) -> Capture | None:
    try:
        return opener()
    except RefusedSetting as error:
        _LOG.debug("camera %s: %s", name, error)
        return None
