"""Bytes of messages that have not wholly arrived: bounded for all clients together.

One client may send a large message; thirty that each send one slowly would fill the memory. When
the bytes run out, the message that has been arriving for longest makes room: whoever is quick is
never refused because somebody else is slow.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType

from jetson.errors import ServerBusy


class ByteBudget:
    """Counts the bytes of all messages that are held; thread-safe."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        # In the order of their beginning.
        self._arriving: list[HeldBytes] = []
        self._total = 0

    @property
    def held_bytes(self) -> int:
        """Bytes that are held now."""
        return self._total

    def hold(self, evict: Callable[[], object]) -> "HeldBytes":
        """Begin a message.

        Args:
            evict: called, from any thread, when the message must make room; must not wait.
        """
        held = HeldBytes(self, evict)
        with self._lock:
            self._arriving.append(held)
        return held

    def add(self, held: "HeldBytes", size: int) -> None:
        """Count bytes that arrived; let slower messages make room for them.

        Raises:
            ServerBusy: no room can be made, or this message is the one that has to make it.
        """
        evicted: list[HeldBytes] = []
        with self._lock:
            if held.evicted:
                raise held.reason()
            held.size += size
            self._total += size
            while self._total > self._limit_bytes and self._arriving:
                slowest = self._arriving.pop(0)
                evicted.append(slowest)
                slowest.evicted = True
                self._total -= slowest.size
                slowest.size = 0
            full = self._total > self._limit_bytes
        for slowest in evicted:
            if slowest is not held:
                slowest.evict()
        if full or held.evicted:
            raise held.reason()

    def complete(self, held: "HeldBytes") -> None:
        """Note that a message is whole: it makes no room any more."""
        with self._lock:
            if held in self._arriving:
                self._arriving.remove(held)

    def release(self, held: "HeldBytes") -> None:
        """Give the bytes of a message back."""
        with self._lock:
            if held in self._arriving:
                self._arriving.remove(held)
            self._total -= held.size
            held.size = 0


class HeldBytes:
    """The bytes of one message; a context manager that gives them back."""

    def __init__(self, budget: ByteBudget, evict: Callable[[], object]) -> None:
        self.size = 0
        # Whether it had to make room.
        self.evicted = False
        self.evict = evict
        self._budget = budget
        self._start_s = time.monotonic()

    def add(self, size: int) -> None:
        """Count bytes that arrived.

        Raises:
            ServerBusy: there is no room for them.
        """
        self._budget.add(self, size)

    def complete(self) -> None:
        """Note that the message is whole."""
        self._budget.complete(self)

    def reason(self) -> ServerBusy:
        """Return why the message is given up."""
        arriving_s = time.monotonic() - self._start_s
        return ServerBusy(
            f"the server holds as many bytes of messages as it may, and this one has been arriving "
            f"for {arriving_s:.1f} s; send smaller images, or faster"
        )

    def __enter__(self) -> "HeldBytes":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._budget.release(self)
