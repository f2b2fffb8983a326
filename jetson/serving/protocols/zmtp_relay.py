"""Before libzmq: messages of strangers are bounded in parts, bytes and time, and so are they.

libzmq bounds a part but takes any number of them, for anybody, before it hands a message over: 600
MB without a token. The relay takes the connections, reads the heads of ZMTP's frames and lets a
message through to libzmq, which listens on a socket that only this user can reach, if it is one
of a REQ client: an empty delimiter and a body within the limit, and the next after the reply.
Source: ZMTP 3.1, https://rfc.zeromq.org/spec/37 (3.0 frames its messages alike).
"""

import asyncio
import contextlib
import itertools
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from jetson.errors import RequestTooLarge, ServerBusy
from jetson.serving.byte_budget import ByteBudget, HeldBytes
from jetson.serving.connections import Connection, Connections
from jetson.serving.event_loop import UnreadTimer, quiet_without_descriptors
from jetson.serving.protocols.zmtp_frames import (
    COMMAND,
    LONG,
    MORE,
    PeerEnded,
    pass_greeting,
    read_blocks,
    read_head,
)
from jetson.serving.security import RateLimit
from qvla_export.shared.errors import QvlaError

_LOG = logging.getLogger(__name__)
_GREETING_S = 10.0
_MAX_COMMAND_BYTES = 4096
# What a peer says of itself once it has greeted; and the property by which libzmq calls it.
_READY, _IDENTITY = b"\x05READY", b"\x08Identity"
_MESSAGE_S = 30.0
_CLOSING_S = 1.0
# So much beyond the limit is read, and thrown away, that the client hears why it is refused.
_PATIENCE_FACTOR = 4
# Free ones when libzmq accepts: for it, the relay, and whatever takes one meanwhile.
_SPARE_DESCRIPTORS = 16


@dataclass(frozen=True)
class RelayLimits:
    """What one message, and all of them, may cost."""

    max_bytes: int
    connections: Connections
    budget: ByteBudget
    rate: RateLimit
    # Raises ServerBusy where no reply can be expected.
    require_alive: Callable[[], None]


class ZmtpRelay:
    """Relays from a port to libzmq on a thread of its own. A context manager."""

    def __init__(
        self,
        host: str,
        port: int,
        behind: Path,
        limits: RelayLimits,
        refusal: Callable[[QvlaError], bytes],
    ) -> None:
        """Listen nowhere yet.

        Args:
            host: address to listen on.
            port: TCP port.
            behind: Unix socket that libzmq listens on.
            limits: of messages and connections.
            refusal: returns the body of a reply that says why there is none.
        """
        self._address = host, port
        self._behind = behind
        self._limits = limits
        self._refusal = refusal
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: set[_Client] = set()
        self._names = itertools.count(1)
        # What libzmq calls a client -> what comes of it.
        self._readers: dict[bytes, asyncio.StreamReader] = {}
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="qvla-zmtp", daemon=True
        )

    def __enter__(self) -> "ZmtpRelay":
        """Open the port.

        Raises:
            OSError: it is taken.
        """
        quiet_without_descriptors(self._loop, _LOG)
        starting = asyncio.start_server(self._relay, *self._address, backlog=128)
        try:
            self._server = self._loop.run_until_complete(starting)
        except OSError:
            self._loop.close()
            raise
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def is_gone(self, name: bytes) -> bool:
        """Say whether a client, by what libzmq calls it, has left; from any thread."""
        reader = self._readers.get(name)
        return reader is None or reader.at_eof() or reader.exception() is not None

    def give_up(self, error: ServerBusy) -> None:
        """Tell those who wait for a reply that none comes, and end; from any thread."""

        def tell() -> None:
            for client in self._clients:
                client.give_up(error)

        with contextlib.suppress(RuntimeError):  # the loop has ended, and they with it
            self._loop.call_soon_threadsafe(tell)

    async def _end(self) -> None:
        self._server.close()
        # libzmq is closed by now: what it said last is on its way out.
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CLOSING_S)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        peer = str((writer.get_extra_info("peername") or ("unknown",))[0])
        close = self._loop.call_soon_threadsafe
        place = Connection(peer, lambda: close(writer.transport.abort))
        name = b"qvla-%d" % next(self._names)
        self._readers[name] = reader
        try:
            self._limits.connections.admit(place)
            _require_spare_descriptors()
            back = await asyncio.open_unix_connection(str(self._behind))
            client = _Client(reader, writer, *back, place, self._limits, self._refusal)
            self._clients.add(client)
            try:
                await client.talk(name)
            finally:
                self._clients.remove(client)
        except (PeerEnded, QvlaError) as ended:
            _LOG.info("ZMQ client %s: %s", peer, ended)
        except (OSError, asyncio.IncompleteReadError, asyncio.TimeoutError, asyncio.CancelledError):
            pass  # it left, or the server ends
        finally:
            self._limits.connections.remove(place)
            del self._readers[name]
            writer.close()  # what was said last is still sent
            with contextlib.suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), _CLOSING_S)
            writer.transport.abort()
            self._tasks.discard(task)


class _Client:
    """One connection, and the one behind it."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back_reader: asyncio.StreamReader,
        back_writer: asyncio.StreamWriter,
        place: Connection,
        limits: RelayLimits,
        refusal: Callable[[QvlaError], bytes],
    ) -> None:
        self._reader, self._writer = reader, writer
        self._back_reader, self._back_writer = back_reader, back_writer
        self._place = place
        self._limits = limits
        self._refusal = refusal
        # Bytes of the message that arrives or waits for its reply.
        self._held: HeldBytes | None = None
        # Set while no message waits for its reply.
        self._answered = asyncio.Event()
        self._answered.set()
        # A frame to the client is never written inside another.
        self._speaking = asyncio.Lock()
        # Done once no reply comes any more.
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def talk(self, name: bytes) -> None:
        """Relay both ways until one side is over; libzmq is told to call the client by a name."""
        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._back_writer.transport.abort)
            ways: list[asyncio.Future[None]] = [
                asyncio.ensure_future(self._inwards(name)),
                asyncio.ensure_future(self._outwards()),
                self._over,
            ]
            stack.push_async_callback(_cancel, ways)
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                if way.done():
                    way.result()

    def give_up(self, error: QvlaError) -> None:
        """Say that a message gets no reply, and end: one that came later would answer the next."""
        if self._answered.is_set() or self._speaking.locked() or self._over.done():
            return
        self._writer.write(_frames(self._refusal(error)))
        self._over.set_result(None)

    async def _inwards(self, name: bytes) -> None:
        await asyncio.wait_for(pass_greeting(self._reader, self._back_writer), _GREETING_S)
        while True:
            flags, size, head = await read_head(self._reader)
            if flags & COMMAND:
                await self._command(head, size, name)
            elif flags != MORE or size:
                raise PeerEnded("it sends other messages than a REQ socket")
            else:
                # The next message waits, unread, until this one is answered.
                await self._answered.wait()
                with self._limits.budget.hold(self._writer.transport.abort) as self._held:
                    await asyncio.wait_for(self._body(head, self._held), _MESSAGE_S)
                    self._held.complete()
                    await self._answered.wait()

    async def _command(self, head: bytes, size: int, name: bytes) -> None:
        if size > _MAX_COMMAND_BYTES:
            raise PeerEnded(f"a command of {size} bytes")
        self._limits.rate.take(self._place.peer)
        command = await self._reader.readexactly(size)
        if command.startswith(_READY):
            # The last of two counts; a name that the client chose could be another's.
            command += _IDENTITY + len(name).to_bytes(4, "big") + name
            head = bytes([COMMAND | LONG]) + len(command).to_bytes(8, "big")
        self._back_writer.write(head + command)
        await self._back_writer.drain()

    async def _body(self, delimiter: bytes, held: HeldBytes) -> None:
        """Let the one part of a message through that follows the delimiter, or say why not."""
        flags, size, head = await read_head(self._reader)
        if flags & (MORE | COMMAND):
            raise PeerEnded("it sends other messages than a REQ socket")
        try:
            self._limits.rate.take(self._place.peer)
            self._limits.require_alive()
            if size > self._limits.max_bytes:
                raise RequestTooLarge(
                    f"a message may have {self._limits.max_bytes} bytes, got {size}; send smaller "
                    "images or raise the server's limit"
                )
        except QvlaError as error:
            await self._refuse(error, size)
            return
        self._back_writer.write(delimiter + head)
        async for block in read_blocks(self._reader, size):
            held.add(len(block))
            self._back_writer.write(block)
            await self._back_writer.drain()
        self._answered.clear()
        self._place.begin()

    async def _refuse(self, error: QvlaError, size: int) -> None:
        """Say why a message is refused, once its bytes are passed over."""
        if size > _PATIENCE_FACTOR * self._limits.max_bytes:
            raise error
        async for _ in read_blocks(self._reader, size):
            pass
        reply = _frames(self._refusal(error))
        async with self._speaking, self._read_in_time():
            self._writer.write(reply)
            await self._writer.drain()

    async def _outwards(self) -> None:
        await pass_greeting(self._back_reader, self._writer)
        while True:
            flags, size, head = await read_head(self._back_reader)
            if not flags & COMMAND and self._held is not None:
                # Nothing waits for a client that does not read: no place, none of what it sent.
                self._limits.budget.release(self._held)
                self._place.finish()
            async with self._speaking, self._read_in_time():
                self._writer.write(head)
                async for block in read_blocks(self._back_reader, size):
                    self._writer.write(block)
                    await self._writer.drain()
                await self._writer.drain()
            if not flags & (MORE | COMMAND):
                self._answered.set()

    @contextlib.asynccontextmanager
    async def _read_in_time(self) -> AsyncIterator[None]:
        """Say something; end the connection if the client does not read it, which keeps a place."""
        unread = UnreadTimer(asyncio.get_running_loop(), self._writer.transport.abort)
        unread.start()
        try:
            yield
        finally:
            unread.stop()


def _frames(body: bytes) -> bytes:
    """Return a reply of the relay's own."""
    return bytes([MORE, 0, LONG]) + len(body).to_bytes(8, "big") + body


def _require_spare_descriptors() -> None:
    """Let libzmq accept only what it can: one descriptor too few, and it ends the process.

    Raises:
        ServerBusy: descriptors run out.
    """
    spare: list[int] = []
    try:
        for _ in range(_SPARE_DESCRIPTORS):
            spare.append(os.dup(2))
    except OSError as error:
        raise ServerBusy(f"no descriptors are left: {error}") from None
    finally:
        for descriptor in spare:
            os.close(descriptor)


async def _cancel(ways: list["asyncio.Future[None]"]) -> None:
    for way in ways:
        way.cancel()
    await asyncio.gather(*ways, return_exceptions=True)
