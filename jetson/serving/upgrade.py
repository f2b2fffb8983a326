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
from collections.abc import Callable
from typing import Any, Protocol

from websockets.datastructures import Headers
from websockets.http11 import Request
from websockets.server import ServerProtocol

from jetson.errors import Forbidden, ServerBusy, Unauthorized, http_status
from jetson.serving.security import Gate
from jetson.serving.websocket import RESTART, ConnectionOver, WebsocketConnection
from qvla_export.shared.errors import QvlaError

_LOG = logging.getLogger(__name__)
_ENDING_S = 5.0


class WebsocketHandler(Protocol):
    """What a protocol on websockets offers."""

    def serve(self, connection: WebsocketConnection, peer: str) -> None:
        """Talk to one client; returns or raises `ConnectionOver` when that is over."""
        ...


class WebsocketThreads:
    """Runs a handler for each client on a thread of its own. A context manager."""

    def __init__(
        self, handler: WebsocketHandler, gate: Gate, max_connections: int, max_bytes: int
    ) -> None:
        self._handler = handler
        self._gate = gate
        self._max_connections = max_connections
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, WebsocketConnection] = {}
        self._ending = False

    def protocol(self, **_: Any) -> asyncio.Protocol:
        """Return what uvicorn lets take over a connection; its own arguments are not needed."""
        return _Handshake(self.check, self.start)

    def check(self, headers: Headers, peer: str) -> None:
        """Let a client in.

        Raises:
            QvlaError: it may not, and why.
        """
        for name in ("host", "origin", "authorization"):
            if len(headers.get_all(name)) > 1:
                raise Forbidden(f"the header {name} is there more than once")
        self._gate.check(headers, peer)
        with self._lock:
            if self._ending or len(self._running) >= self._max_connections:
                raise ServerBusy(
                    f"{len(self._running)} websocket clients are connected, the limit is "
                    f"{self._max_connections}; close one or raise the server's limit"
                )

    def start(self, stream: socket.socket, greeting: bytes, peer: str) -> None:
        """Serve a client that was let in; `greeting` completes the handshake."""
        connection = WebsocketConnection(stream, self._max_bytes)
        thread = threading.Thread(
            target=self._serve,
            args=(connection, stream, greeting, peer),
            name=f"qvla-websocket-{peer}",
            daemon=True,
        )
        with self._lock:
            self._running[thread] = connection
        thread.start()

    def _serve(
        self, connection: WebsocketConnection, stream: socket.socket, greeting: bytes, peer: str
    ) -> None:
        try:
            stream.sendall(greeting)
            self._handler.serve(connection, peer)
        except (ConnectionOver, OSError) as over:
            _LOG.info("websocket client %s: %s", peer, over)
        except Exception:
            _LOG.exception("websocket client %s: a failure of the server's own", peer)
        finally:
            connection.close(RESTART if self._ending else 1011)
            with self._lock:
                del self._running[threading.current_thread()]

    def __enter__(self) -> "WebsocketThreads":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Close every connection with 1012 once its request under way is answered."""
        with self._lock:
            self._ending = True
            running = dict(self._running)
        for connection in running.values():
            connection.wake()
        for thread in running:
            thread.join(_ENDING_S)


class _Handshake(asyncio.Protocol):
    """Answers the upgrade request; then pumps if the connection is encrypted."""

    def __init__(
        self,
        check: Callable[[Headers, str], None],
        start: Callable[[socket.socket, bytes, str], None],
    ) -> None:
        self._check = check
        self._start = start
        self._pumped: socket.socket | None = None
        self._sending: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

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
            try:
                self._check(request.headers, peer)
            except QvlaError as error:
                _LOG.warning("websocket client %s: %s", peer, error)
                reason = {"error": str(error), "kind": type(error).__name__}
                response = server.reject(http_status(error), json.dumps(reason))
                del response.headers["Content-Type"]
                response.headers["Content-Type"] = "application/json"
                if isinstance(error, Unauthorized):
                    response.headers["WWW-Authenticate"] = "Bearer"
            else:
                self._start(self._take_socket(), response.serialize(), peer)
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
                self._transport.write(data)
        except OSError as error:
            _LOG.info("a websocket client left: %s", error)
        finally:
            self._transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        if self._pumped is not None:
            self._receiving.cancel()
            if self._sending is not None:
                self._sending.cancel()
            self._pumped.close()
