"""The board's state, sampled at a low rate beside the robot's work and never on a request."""

import logging
import threading
import time
from collections.abc import Callable

from jetson.board import BoardState, read_board_state
from jetson.repeated_warning import RepeatedWarning

_LOG = logging.getLogger(__name__)
# Samples that may be missing before the board counts as lost.
_MISSED_PERIODS = 5


class BoardWatch:
    """Reads the board on a thread of its own. A context manager."""

    def __init__(
        self, period_s: float = 2.0, read: Callable[[], BoardState] = read_board_state
    ) -> None:
        self._read = read
        self._period_s = period_s
        self._state = read()
        self._sampled_s = time.monotonic()
        self._failures = RepeatedWarning(_LOG)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qvla-board", daemon=True)

    @property
    def is_sampling(self) -> bool:
        """Whether the newest sample is not older than a few periods."""
        return time.monotonic() - self._sampled_s < _MISSED_PERIODS * self._period_s + 1.0

    @property
    def state(self) -> BoardState:
        """The newest sample."""
        return self._state

    def __enter__(self) -> "BoardWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        # A sysfs read that hangs must not keep the server from ending.
        self._thread.join(timeout=1.0)

    def _watch(self) -> None:
        while not self._ended.wait(self._period_s):
            try:
                self._state = self._read()
                self._sampled_s = time.monotonic()
            except Exception as error:  # out of descriptors, a driver reloaded: the next may do
                self._failures.warn(f"the board cannot be read: {error}")
