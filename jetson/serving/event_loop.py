"""The event loops that serve: TLS handshakes hold a place and end, and accepting may fail quietly.

asyncio waits a minute for a handshake, and tells a protocol of a connection only once it is over:
until then strangers could open as many as there are descriptors. Here a connection has its place
before it begins.
"""

import asyncio
import logging
import ssl
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from jetson.repeated_warning import RepeatedWarning

# As long as the head of a request may take.
HANDSHAKE_TIMEOUT_S = 10.0
# How long a client may leave unread what it was sent.
UNREAD_TIMEOUT_S = 30.0


class Arriving(asyncio.Protocol, ABC):
    """A protocol of asyncio that is told of a connection before its handshake."""

    @abstractmethod
    def arrive(self, transport: asyncio.Transport) -> bool:
        """Give a connection a place; close it and return False where there is none."""

    @abstractmethod
    def leave(self) -> None:
        """Give the place of a connection back that never got to its protocol."""


class ServingLoop(asyncio.SelectorEventLoop):
    """asyncio's own, where a connection counts from its first byte and a handshake ends in time."""

    async def create_server(self, protocol_factory: Any, *args: Any, **kwargs: Any) -> Any:
        """Listen; see `asyncio.loop.create_server`. Under TLS the protocols are `Arriving`."""
        context = kwargs.pop("ssl", None)
        if context is None:
            return await super().create_server(protocol_factory, *args, **kwargs)
        return await super().create_server(
            lambda: _Handshake(self, protocol_factory(), context), *args, **kwargs
        )


class _Handshake(asyncio.Protocol):
    """A connection until it is encrypted."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, protocol: Arriving, context: ssl.SSLContext
    ) -> None:
        self._loop = loop
        self._protocol = protocol
        self._context = context
        # A client that is quick asks in the same breath in which it ends the handshake.
        self._early = bytearray()
        self._is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        if self._protocol.arrive(transport):
            self._task = self._loop.create_task(self._encrypt(transport))

    def data_received(self, data: bytes) -> None:
        self._early += data

    def connection_lost(self, error: Exception | None) -> None:
        self._is_lost = True
        self._protocol.leave()

    async def _encrypt(self, transport: asyncio.Transport) -> None:
        try:
            encrypted = await self._loop.start_tls(
                transport,
                self,
                self._context,
                server_side=True,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )
        except (OSError, asyncio.TimeoutError):  # of TLS, or it left
            encrypted = None
        if encrypted is None or self._is_lost:
            self._protocol.leave()
            transport.abort()
            return
        encrypted.set_protocol(self._protocol)
        self._protocol.connection_made(encrypted)
        if self._early:
            self._protocol.data_received(bytes(self._early))


def quiet_without_descriptors(loop: asyncio.AbstractEventLoop, log: logging.Logger) -> None:
    """Let a loop say once a minute, not a hundred times a second, that it cannot accept.

    asyncio stops accepting for a second then, and clients wait in the backlog.
    """
    failures = RepeatedWarning(log)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "socket.accept()" in str(context.get("message")):
            failures.warn(f"no connection can be accepted: {context.get('exception')}")
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)


class UnreadTimer:
    """Ends a connection whose client does not read what it was sent."""

    def __init__(self, loop: asyncio.AbstractEventLoop, end: Callable[[], object]) -> None:
        self._loop = loop
        self._end = end
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to wait, unless it waits already."""
        if self._timer is None:
            self._timer = self._loop.call_later(UNREAD_TIMEOUT_S, self._end)

    def stop(self) -> None:
        """Note that the client reads, or is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
