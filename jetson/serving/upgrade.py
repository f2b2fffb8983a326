"""From an HTTP request to a thread: the websocket handshake, behind the gate.

uvicorn hands over a connection that asks for an upgrade. Whoever passes gets a thread of its own
with a blocking socket: the connection's, or under TLS one end of a pair that is pumped, as the
encryption stays with the event loop.
"""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from websockets.datastructures import Headers
from websockets.http11 import Request
from websockets.server import ServerProtocol

from jetson.errors import (
    RETRY_AFTER_S,
    Forbidden,
    RateLimited,
    ServerBusy,
    Unauthorized,
    http_status,
)
from jetson.serving.byte_budget import ByteBudget
from jetson.serving.connections import Connection, Connections
from jetson.serving.event_loop import UnreadTimer
from jetson.serving.security import Gate
from jetson.serving.websocket import RESTART, ConnectionOver, WebsocketConnection, closing_code
from qvla_export.shared.errors import QvlaError

_LOG = logging.getLogger(__name__)
_ENDING_S = 5.0


class WebsocketHandler(Protocol):
    """What a protocol on websockets offers."""

    def serve(self, connection: WebsocketConnection, peer: str) -> None:
        """Talk to one client; returns or raises `ConnectionOver` when that is over."""
        ...


# From what a client asks for, path and query, to what talks to it; raises QvlaError for what is
# not served.
Route = Callable[[str], WebsocketHandler]


class WebsocketThreads:
    """Runs a handler for each client on a thread of its own. A context manager."""

    def __init__(
        self,
        route: Route,
        gate: Gate,
        connections: Connections,
        budget: ByteBudget,
        max_bytes: int,
    ) -> None:
        """Serve nobody yet.

        Args:
            route: finds what talks to a client.
            gate: who may come in.
            connections: of websocket clients.
            budget: bytes of messages of all clients.
            max_bytes: longest message.
        """
        self._route = route
        self._gate = gate
        self._connections = connections
        self._budget = budget
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, WebsocketConnection] = {}
        self._ending = False

    def protocol(self, **_: Any) -> asyncio.Protocol:
        """Return what uvicorn lets take over a connection; its own arguments are not needed."""
        return _Handshake(self)

    def check(self, headers: Headers, peer: str) -> None:
        """Let a client in.

        Raises:
            QvlaError: it may not, and why.
        """
        for name in ("host", "origin", "authorization"):
            if len(headers.get_all(name)) > 1:
                raise Forbidden(f"the header {name} is there more than once")
        self._gate.check(headers, peer)
        if self._ending:
            raise ServerBusy("the server is shutting down; come back once it is up again")

    def handler_of(self, target: str) -> WebsocketHandler:
        """Return what talks to a client that was let in and asks for this path and query.

        Raises:
            QvlaError: they are not served, and why.
        """
        return self._route(target)

    def admit(self, place: Connection) -> None:
        """Give a client that was let in a place.

        Raises:
            ServerBusy: all are in use.
        """
        self._connections.admit(place)

    def start(
        self, stream: socket.socket, greeting: bytes, place: Connection, handler: WebsocketHandler
    ) -> None:
        """Serve a client that has a place; `greeting` completes the handshake."""
        peer = place.peer
        connection = WebsocketConnection(
            stream, self._max_bytes, self._budget, place, self._gate.rate
        )
        place.close = partial(connection.make_room, place.close)

        def talk() -> None:
            stream.sendall(greeting)
            handler.serve(connection, peer)

        thread = threading.Thread(
            target=self._serve,
            args=(connection, place, talk),
            name=f"qvla-websocket-{peer}",
            daemon=True,
        )
        with self._lock:
            self._running[thread] = connection
        thread.start()

    def _serve(
        self, connection: WebsocketConnection, place: Connection, talk: Callable[[], None]
    ) -> None:
        peer = place.peer
        try:
            talk()
        except (ConnectionOver, OSError) as over:
            _LOG.info("websocket client %s: %s", peer, over)
        except Exception:
            _LOG.exception("websocket client %s: a failure of the server's own", peer)
        finally:
            connection.close(RESTART if self._ending else 1011)
            self._connections.remove(place)
            with self._lock:
                del self._running[threading.current_thread()]

    def __enter__(self) -> "WebsocketThreads":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def give_up(self, error: ServerBusy) -> None:
        """Tell those who wait for an action, whose threads wait for the engine, that none comes."""
        with self._lock:
            running = dict(self._running)
        for connection in running.values():
            connection.give_up(closing_code(error), str(error))

    def end(self) -> None:
        """Close every connection with 1012 once its request under way is answered."""
        with self._lock:
            self._ending = True
            running = dict(self._running)
        for connection in running.values():
            connection.wake()
        # All together: one that does not read its reply keeps the others' end from none.
        end_s = time.monotonic() + _ENDING_S
        for thread in running:
            thread.join(max(0.0, end_s - time.monotonic()))


class _Handshake(asyncio.Protocol):
    """Answers the upgrade request; then pumps if the connection is encrypted."""

    def __init__(self, threads: WebsocketThreads) -> None:
        self._threads = threads
        self._writable = asyncio.Event()
        self._writable.set()
        self._pumped: socket.socket | None = None
        self._sending: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._unread = UnreadTimer(asyncio.get_running_loop(), transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._pumped is not None:
            self._transport.pause_reading()
            self._sending = asyncio.create_task(self._pump_in(self._pumped, data))
            return
        server = ServerProtocol(max_size=None)
        server.receive_data(data)
        request = next(iter(server.events_received()), None)
        if not isinstance(request, Request):
            self._transport.close()
            return
        peer = str((self._transport.get_extra_info("peername") or ("unknown",))[0])
        response = server.accept(request)
        if response.status_code == 101:
            loop = asyncio.get_running_loop()
            place = Connection(peer, partial(loop.call_soon_threadsafe, self._transport.abort))
            try:
                self._threads.check(request.headers, peer)
                handler = self._threads.handler_of(request.path)
                self._threads.admit(place)
            except QvlaError as error:
                _LOG.warning("websocket client %s: %s", peer, error)
                reason = {"error": str(error), "kind": type(error).__name__}
                response = server.reject(http_status(error), json.dumps(reason))
                del response.headers["Content-Type"]
                response.headers["Content-Type"] = "application/json"
                if isinstance(error, ServerBusy | RateLimited):
                    response.headers["Retry-After"] = str(RETRY_AFTER_S)
                if isinstance(error, Unauthorized):
                    response.headers["WWW-Authenticate"] = "Bearer"
            else:
                self._threads.start(self._take_socket(), response.serialize(), place, handler)
                return
        self._transport.write(response.serialize())
        self._transport.close()

    def _take_socket(self) -> socket.socket:
        """Return a socket of the connection that the event loop does not read."""
        if self._transport.get_extra_info("sslcontext") is None:
            own: socket.socket = self._transport.get_extra_info("socket").dup()
            # Closes the event loop's descriptor, not the connection.
            self._transport.abort()
            return own
        own, self._pumped = socket.socketpair()
        self._pumped.setblocking(False)
        self._receiving = asyncio.create_task(self._pump_out(self._pumped))
        return own

    async def _pump_in(self, pumped: socket.socket, data: bytes) -> None:
        try:
            await asyncio.get_running_loop().sock_sendall(pumped, data)
            self._transport.resume_reading()
        except OSError:
            self._transport.abort()

    async def _pump_out(self, pumped: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await loop.sock_recv(pumped, 1 << 16):
                # A client that does not read fills no memory of ours: the thread waits for it.
                await self._writable.wait()
                self._transport.write(data)
        except OSError as error:
            _LOG.info("a websocket client left: %s", error)
        finally:
            self._transport.close()

    def pause_writing(self) -> None:
        """Stop taking from the thread while the client does not read, which it may only so long."""
        self._writable.clear()
        self._unread.start()

    def resume_writing(self) -> None:
        """Go on."""
        self._writable.set()
        self._unread.stop()

    def connection_lost(self, error: Exception | None) -> None:
        self._unread.stop()
        if self._pumped is not None:
            self._receiving.cancel()
            if self._sending is not None:
                self._sending.cancel()
            self._pumped.close()
