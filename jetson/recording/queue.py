"""Between a robot that must not wait and a disk that may: a queue that drops when it is full."""

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class QueuedWrite:
    """Something to write."""

    # Writes it, on the writer's thread.
    write: Callable[[], None]
    # What keeping it costs.
    nbytes: int


class DropQueue:
    """First in, first out, bounded in bytes; putting never waits. Thread-safe."""

    def __init__(self, max_bytes: int) -> None:
        # Events that did not fit.
        self.dropped = 0
        self._max_bytes = max_bytes
        self._nbytes = 0
        self._waiting: deque[QueuedWrite] = deque()
        self._closed = False
        self._changed = threading.Condition()

    def put(self, event: QueuedWrite) -> bool:
        """Append an event, or count it as dropped; return which."""
        with self._changed:
            full = self._nbytes + event.nbytes > self._max_bytes
            if self._closed or full:
                self.dropped += 1
                return False
            self._nbytes += event.nbytes
            self._waiting.append(event)
            self._changed.notify()
            return True

    def take(self, timeout_s: float) -> QueuedWrite | None:
        """Return the oldest event; None if there is none within that time, or none left."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout_s)
            if not self._waiting:
                return None
            event = self._waiting.popleft()
            self._nbytes -= event.nbytes
            return event

    def close(self) -> None:
        """Take nothing more; what is there can still be taken."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def fail(self, lost: int) -> None:
        """Take nothing more; count what waits, and what was taken and is lost, as dropped."""
        with self._changed:
            self._closed = True
            self.dropped += lost + len(self._waiting)
            self._waiting.clear()
            self._nbytes = 0
            self._changed.notify()

    @property
    def is_done(self) -> bool:
        """Whether it is closed and everything was taken."""
        with self._changed:
            return self._closed and not self._waiting
