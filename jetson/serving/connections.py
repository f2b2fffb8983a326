"""Connections: how many there may be, who makes room, and how long a request may take to begin.

A connection that has asked for nothing costs a descriptor and shuts others out. So there is a
bound below the descriptor limit, over all clients and for each that is on another machine; when it
is reached, the connection that has been idle for longest makes room, and only if none is idle is
the newcomer told to come back.
"""

import logging
import resource
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from jetson.errors import ServerBusy
from jetson.repeated_warning import RepeatedWarning

_LOG = logging.getLogger(__name__)
# A connection makes room once it has asked for nothing for so long.
IDLE_S = 2.0
# Files, sockets and pipes that are no client's: engine, recorder, board, ZMQ, logs.
_OWN_DESCRIPTORS = 192
# A connection that is handed over to a thread has two for a moment, under TLS three.
_DESCRIPTORS_EACH = 3
_MAX_CONNECTIONS = 512
_LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


def raise_descriptor_limit() -> int:
    """Raise this process's limit of descriptors as far as it may; return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return max(soft, most)


def connection_limit() -> int:
    """Return how many connections the descriptors allow, at most 512."""
    left = raise_descriptor_limit() - _OWN_DESCRIPTORS
    return max(8, min(_MAX_CONNECTIONS, left // _DESCRIPTORS_EACH))


@dataclass(eq=False)
class Connection:
    """One client's connection."""

    peer: str
    # Ends it, from any thread; must not wait.
    close: Callable[[], object]
    # Whether a request of it is being answered.
    busy: bool = False
    # Whether the client has left.
    is_gone: bool = False
    # When it last finished a request, or began.
    idle_since_s: float = field(default_factory=time.monotonic)

    def begin(self) -> None:
        """Note that a whole request has arrived."""
        self.busy = True

    def finish(self) -> None:
        """Note that it was answered."""
        self.busy = False
        self.idle_since_s = time.monotonic()


class Connections:
    """All connections of one kind; thread-safe."""

    def __init__(self, limit: int, limit_each: int, what: str) -> None:
        """Bound them.

        Args:
            limit: connections of all clients together.
            limit_each: of one address that is not this machine's.
            what: the kind, for messages: "websocket clients".
        """
        self._limit = limit
        self._limit_each = limit_each
        self._what = what
        self._lock = threading.Lock()
        self._open: set[Connection] = set()
        self._peers: Counter[str] = Counter()
        self._full = RepeatedWarning(_LOG)

    def __len__(self) -> int:
        return len(self._open)

    def admit(self, connection: Connection) -> None:
        """Take a connection in; one that is idle makes room if there is none.

        Raises:
            ServerBusy: all are in use.
        """
        with self._lock:
            leaver = self._leaver(connection.peer)
            if leaver is not None:
                self._remove(leaver)
            self._open.add(connection)
            self._peers[connection.peer] += 1
        if leaver is not None:
            self._full.warn(f"{self._what} are at their limit; an idle one of {leaver.peer} ends")
            leaver.close()

    def remove(self, connection: Connection) -> None:
        """Forget a connection that is over."""
        with self._lock:
            self._remove(connection)

    def _remove(self, connection: Connection) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self._peers[connection.peer] -= 1
            self._peers += Counter()  # forgets peers without connections

    def _leaver(self, peer: str) -> Connection | None:
        """Return who makes room for a newcomer; None if nobody need."""
        own = peer not in _LOOPBACK and self._peers[peer] >= self._limit_each
        if not own and len(self._open) < self._limit:
            return None
        latest_s = time.monotonic() - IDLE_S
        idle = [
            c
            for c in self._open
            if not c.busy and c.idle_since_s <= latest_s and (not own or c.peer == peer)
        ]
        if not idle:
            limit = self._limit_each if own else self._limit
            raise ServerBusy(
                f"{len(self._open)} {self._what} are connected, the limit is {limit}"
                f"{' for one address' if own else ''}; close one, or come back in {IDLE_S:g} s"
            )
        return min(idle, key=lambda c: c.idle_since_s)


def client_places(limit: int, what: str) -> Connections:
    """Return places for clients that stay: half of them at most for one other machine."""
    return Connections(limit, max(1, limit // 2), what)
