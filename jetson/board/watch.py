"""The board's state, sampled at a low rate beside the robot's work and never on a request."""

import logging
import threading
from collections.abc import Callable

from jetson.board import BoardState, read_board_state
from jetson.repeated_warning import RepeatedWarning

_LOG = logging.getLogger(__name__)


class BoardWatch:
    """Reads the board on a thread of its own. A context manager."""

    def __init__(
        self, period_s: float = 2.0, read: Callable[[], BoardState] = read_board_state
    ) -> None:
        self._read = read
        self._period_s = period_s
        self._state = read()
        self._failures = RepeatedWarning(_LOG)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qvla-board", daemon=True)

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
            except Exception as error:  # out of descriptors, a driver reloaded: the next may do
                self._failures.warn(f"the board cannot be read: {error}")
