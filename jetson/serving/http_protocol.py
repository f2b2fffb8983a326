"""HTTP connections that are waited for only so long, and only so many of them.

uvicorn waits without end for the head of a request, and takes every connection. Here a head must
be whole within ten seconds of its first byte, or of the connection; connections are counted, and
one that has asked for nothing makes room for another; one that leaves replies unread ends.
"""

import asyncio
import json
import logging
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from jetson.errors import RETRY_AFTER_S, ServerBusy
from jetson.repeated_warning import RepeatedWarning
from jetson.serving.connections import Connection, Connections
from jetson.serving.event_loop import Arriving, UnreadTimer

HEAD_TIMEOUT_S = 10.0
# A body may have so many chunks that are shorter than this.
_MOST_SMALL_CHUNKS, _SMALL_BYTES = 1024, 1024
# What a client of HTTP/2 says first (RFC 9113, 3.4); gRPC's are the only ones without asking.
_HTTP_2 = b"PRI * HTTP/2.0\r\n"
_GRPC = RepeatedWarning(logging.getLogger(__name__))


class HttpConnection(H11Protocol, Arriving):
    """One HTTP connection; `state.connection` of its requests is what is known of it."""

    def __init__(self, *arguments: Any, connections: Connections, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self.conn = _Parser(h11.SERVER)
        self._connections = connections
        self._connection: Connection | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        # Whoever does not read keeps no place.
        self._unread = UnreadTimer(self.loop, lambda: self.transport.abort())

    def arrive(self, transport: asyncio.Transport) -> bool:
        """Give a connection a place before its TLS handshake; close it where there is none."""
        try:
            self._admit(transport)
        except ServerBusy:
            transport.abort()  # It could not read why.
            return False
        return True

    def leave(self) -> None:
        """Give the place of a connection back whose handshake failed."""
        self._forget()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the connection, or say that there are too many."""
        assert isinstance(transport, asyncio.Transport)
        super().connection_made(transport)
        try:
            connection = self._connection or self._admit(transport)
        except ServerBusy as error:
            transport.write(_refusal(error))
            transport.close()
            return
        self.app_state = {**self.app_state, "connection": connection}
        self._await_head()

    def _admit(self, transport: asyncio.Transport) -> Connection:
        peer = str((transport.get_extra_info("peername") or ("unknown",))[0])
        connection = Connection(peer, lambda: self.loop.call_soon_threadsafe(transport.abort))
        self._connections.admit(connection)
        self._connection = connection
        return connection

    def pause_writing(self) -> None:
        """Wait only so long for a client that does not read."""
        super().pause_writing()
        self._unread.start()
        if self._connection is not None:
            # Its request is answered; others may have the place.
            self._connection.finish()

    def resume_writing(self) -> None:
        """Go on with a client that reads."""
        super().resume_writing()
        self._unread.stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; its request, if one waits, is not answered any more."""
        self._forget()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, as long as they are a request in time."""
        if self._connection is None:
            return
        if data.startswith(_HTTP_2):
            _GRPC.warn(
                f"{self._connection.peer} speaks gRPC, as LeRobot's async inference does: its "
                "messages are pickles, which run what they say, and are not read here. Ask with "
                "jetson.clients.http_client.RemotePolicy or openpi-client: see docs/serving.md"
            )
            self.transport.abort()
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE:
            self._await_head()
        else:
            self._stop_waiting()
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            self._connection.begin()

    def send_400_response(self, msg: str) -> None:
        """Say that this is no HTTP, unless a reply was begun before that showed: then end."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def handle_websocket_upgrade(self, event: h11.Request) -> None:
        """Hand the connection over; it counts as a websocket client from here on."""
        self._forget()
        super().handle_websocket_upgrade(event)

    def on_response_complete(self) -> None:
        """Note that the request is answered."""
        super().on_response_complete()
        if self._connection is not None:
            self._connection.finish()

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _forget(self) -> None:
        self._stop_waiting()
        self._unread.stop()
        if self._connection is not None:
            self._connection.is_gone = True
            self._connections.remove(self._connection)


class _Parser(h11.Connection):
    """h11's, for which a body of millions of chunks is no body: each costs more than its bytes."""

    _small_chunks = 0

    def next_event(self) -> h11.Event | type[h11.NEED_DATA] | type[h11.PAUSED]:
        """Return what comes next.

        Raises:
            h11.RemoteProtocolError: it is no HTTP, or one small chunk too many.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._small_chunks = 0
        elif isinstance(event, h11.Data) and event.chunk_end and len(event.data) < _SMALL_BYTES:
            self._small_chunks += 1
            if self._small_chunks > _MOST_SMALL_CHUNKS:
                raise h11.RemoteProtocolError("a body has too many small chunks")
        return event


def _refusal(error: ServerBusy) -> bytes:
    body = json.dumps({"error": str(error), "kind": type(error).__name__}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nretry-after: {RETRY_AFTER_S}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
