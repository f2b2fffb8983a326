"""Websocket messages on a blocking socket: a message wakes one thread, and that one answers it.

An event loop would wake a second thread for every observation and copy it three times more,
which together cost more than decoding it. Frames are those of RFC 6455, section 5, as a server
sees them; no extensions.
"""

import socket
import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import numpy as np

from jetson.errors import RateLimited, ServerBusy
from jetson.serving.byte_budget import ByteBudget, HeldBytes
from jetson.serving.connections import Connection
from jetson.serving.security import RateLimit
from qvla_export.shared.errors import QvlaError

_CONTINUATION, _TEXT, _BINARY, _CLOSE, _PING, _PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
_FINAL, _MASKED = 0x80, 0x80
_MAX_CONTROL_BYTES = 125
_MAX_REASON_BYTES = 100
# Beyond it a message is a chain of nothing.
_MAX_FRAMES = 64
# How much is made ready at once for a payload: it grows with what arrives.
_BLOCK_BYTES = 1 << 20
# How long a client may take to read a reply, and to answer the closing of a connection.
_SEND_S = 30
# How long a message may take to arrive; how often a silent client is asked whether it is there.
_MESSAGE_S = 30.0
_PING_S = 20.0
_LOOK_S = 5
_CLOSING_S = 2.0
PROTOCOL_ERROR, POLICY_VIOLATION, TOO_BIG, INTERNAL_ERROR = 1002, 1008, 1009, 1011
RESTART, TRY_AGAIN = 1012, 1013


class ConnectionOver(Exception):
    """The client left, or the connection was closed for the code and reason given."""


class WebsocketConnection:
    """One client after the handshake; not thread-safe, but for what says so.

    Args:
        stream: a connected socket; closed by `close`.
        max_bytes: longest message, fragments together.
        budget: bytes of messages of all clients.
        connection: what others know of it.
        rate: what a client may ask in a second; a ping asks too.
    """

    def __init__(
        self,
        stream: socket.socket,
        max_bytes: int,
        budget: ByteBudget,
        connection: Connection,
        rate: RateLimit,
    ) -> None:
        self._stream = stream
        self._rate = rate
        self._max_bytes = max_bytes
        self._budget = budget
        self._connection = connection
        self._held: HeldBytes | None = None
        self._close_sent = False
        # Held while something is on its way, which a client may not read.
        self._sending = threading.Lock()
        # When the message that is arriving began; None between messages.
        self._began_s: float | None = None
        # When the client last said anything, and when it was asked since.
        self._heard_s = time.monotonic()
        self._asked_s: float | None = None
        stream.setblocking(True)
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("@ll", _SEND_S, 0))
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _LOOK_S, 0))

    def receive(self) -> bytearray | str:
        """Return the next message; answers pings on the way.

        Raises:
            ConnectionOver: the client left or broke the protocol.
        """
        self._connection.finish()
        self._began_s = None
        self._release()
        kind: int | None = None
        parts: list[bytearray] = []
        size = 0
        self._held = held = self._budget.hold(self.wake)
        while True:
            opcode, final, payload = self._frame(self._max_bytes - size)
            if opcode >= _CLOSE:
                self._control(opcode, payload)
                if not parts:  # it is no beginning of a message
                    self._began_s = None
                continue
            if (opcode == _CONTINUATION) != (kind is not None):
                raise self._violation(PROTOCOL_ERROR, "fragments out of order")
            kind = opcode if kind is None else kind
            parts.append(payload)
            size += len(payload)
            if final:
                held.complete()
                self._connection.begin()
                whole = parts[0] if len(parts) == 1 else bytearray().join(parts)
                return whole if kind == _BINARY else whole.decode("utf-8", "replace")
            if len(parts) >= _MAX_FRAMES:
                raise self._violation(TOO_BIG, f"a message may have {_MAX_FRAMES} frames")

    def send(self, message: bytes | str) -> None:
        """Send a binary or a text message; while the client does not read it, others go first.

        Raises:
            ConnectionOver: the client left, or does not read.
        """
        self._release()
        self._connection.finish()
        if isinstance(message, str):
            self._send(_TEXT, message.encode("utf-8", "replace"))
        else:
            self._send(_BINARY, message)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Say why unless that is said, wait shortly for the client to have read it, and close."""
        self._release()
        with suppress(ConnectionOver, OSError):
            self._send_close(struct.pack("!H", code) + reason.encode()[:_MAX_REASON_BYTES])
            self._stream.shutdown(socket.SHUT_WR)
            # Closing with bytes unread would reset the connection, and what was said be lost.
            self._stream.settimeout(_CLOSING_S)
            for _ in range(64):
                if not self._stream.recv(1 << 20):
                    break
        self._stream.close()

    def give_up(self, code: int, reason: str) -> None:
        """Say, from any thread, that what was asked for does not come; nothing is sent after it."""
        if not self._connection.busy or not self._sending.acquire(blocking=False):
            return
        try:
            if not self._close_sent:
                self._close_sent = True
                frame = _head(_CLOSE, 2 + len(told := reason.encode()[:_MAX_REASON_BYTES])) + (
                    struct.pack("!H", code) + told
                )
                with suppress(OSError):
                    self._stream.send(frame, socket.MSG_DONTWAIT)
                    self._stream.shutdown(socket.SHUT_WR)
        finally:
            self._sending.release()

    def wake(self) -> None:
        """Let a `receive` that waits in another thread find the client gone; from any thread."""
        with suppress(OSError):
            self._stream.shutdown(socket.SHUT_RD)

    def make_room(self, abort: Callable[[], object]) -> None:
        """Let another client have the place, from any thread.

        Args:
            abort: ends an encrypted connection at once.
        """
        if not self._sending.locked():
            self.wake()
            return
        # It does not read: what is said to it now would wait as well.
        abort()
        with suppress(OSError):
            self._stream.shutdown(socket.SHUT_RDWR)

    @property
    def is_gone(self) -> bool:
        """Whether the connection is closed, by the client or here; takes nothing from it."""
        if self._close_sent:
            return True
        try:
            return not self._stream.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _release(self) -> None:
        if self._held is not None:
            self._budget.release(self._held)
            self._held = None

    def _frame(self, left_bytes: int) -> tuple[int, bool, bytearray]:
        first, second = self._read(2)
        if self._began_s is None:
            self._began_s = time.monotonic()
        opcode, size = first & 0x0F, second & 0x7F
        if first & 0x70 or not second & _MASKED or _BINARY < opcode < _CLOSE or opcode > _PONG:
            raise self._violation(PROTOCOL_ERROR, "not a masked frame without extensions")
        if opcode >= _CLOSE and (size > _MAX_CONTROL_BYTES or not first & _FINAL):
            raise self._violation(PROTOCOL_ERROR, "a control frame is short and whole")
        if size > _MAX_CONTROL_BYTES:
            size = int.from_bytes(self._read(2 if size == 126 else 8), "big")
        if size > left_bytes and opcode < _CLOSE:
            raise self._violation(TOO_BIG, f"a message may have {self._max_bytes} bytes")
        mask = self._read(4)
        payload = self._read(size)
        _unmask(payload, mask)
        return opcode, bool(first & _FINAL), payload

    def _control(self, opcode: int, payload: bytearray) -> None:
        try:
            self._rate.take(self._connection.peer)
        except RateLimited as error:
            raise self._violation(TRY_AGAIN, str(error)) from None
        if opcode == _PING:
            self._send(_PONG, payload)
        elif opcode == _CLOSE:
            with suppress(ConnectionOver):
                self._send_close(payload[:2])
            raise ConnectionOver("the client closed the connection")

    def _violation(self, code: int, reason: str) -> ConnectionOver:
        self.close(code, reason)
        return ConnectionOver(f"closed with {code}: {reason}")

    def _read(self, size: int) -> bytearray:
        data = bytearray(min(size, _BLOCK_BYTES))
        got = 0
        while got < size:
            if got == len(data):
                data += bytes(min(size - got, len(data)))
            with memoryview(data) as view:
                count = self._receive_into(view[got:])
            got += count
            if count > _MAX_CONTROL_BYTES:
                self._count(count)
        return data

    def _receive_into(self, view: memoryview) -> int:
        """Return how many bytes came; 0 if none did for a while, which may go on only so long."""
        count = 0
        try:
            count = self._stream.recv_into(view, 0, socket.MSG_WAITALL)
        except BlockingIOError:  # SO_RCVTIMEO passed
            self._check_silence()
            return 0
        except OSError as error:
            raise ConnectionOver(f"the connection broke: {error}") from None
        if not count:
            raise ConnectionOver("the client left, or had to make room for others")
        self._heard_s, self._asked_s = time.monotonic(), None
        self._check_pace()
        return count

    def _count(self, size: int) -> None:
        """Count bytes of a message with everybody's."""
        if self._held is None:
            return
        try:
            self._held.add(size)
        except ServerBusy as error:
            raise self._violation(TRY_AGAIN, str(error)) from None

    def _check_silence(self) -> None:
        """Ask a client that says nothing whether it is there; give it up if it does not answer."""
        self._check_pace()
        now_s = time.monotonic()
        if self._asked_s is not None and now_s - self._asked_s > _PING_S:
            raise ConnectionOver(f"the client was silent for {now_s - self._heard_s:.0f} s")
        if self._asked_s is None and now_s - self._heard_s > _PING_S:
            self._asked_s = now_s
            self._send(_PING, b"")

    def _check_pace(self) -> None:
        began_s = self._began_s
        if began_s is not None and time.monotonic() - began_s > _MESSAGE_S:
            raise self._violation(
                POLICY_VIOLATION, f"a message must arrive within {_MESSAGE_S:g} s"
            )

    def _send_close(self, payload: bytes | bytearray) -> None:
        if not self._close_sent:
            self._close_sent = True
            self._send(_CLOSE, payload)

    def _send(self, opcode: int, payload: bytes | bytearray) -> None:
        left, end_s = memoryview(_head(opcode, len(payload)) + payload), time.monotonic() + _SEND_S
        try:
            with self._sending:
                while left:
                    left = left[self._stream.send(left) :]
                    # A byte now and then would keep `sendall` for ever.
                    if left and time.monotonic() > end_s:
                        raise TimeoutError(f"not within {_SEND_S} s")
        except OSError as error:
            raise ConnectionOver(f"the client does not read: {error}") from None


def closing_code(error: QvlaError) -> int:
    """Return the code with which an error closes a connection: whether to ask again, or why not."""
    return TRY_AGAIN if isinstance(error, ServerBusy | RateLimited) else INTERNAL_ERROR


def _head(opcode: int, size: int) -> bytes:
    if size <= _MAX_CONTROL_BYTES:
        return struct.pack("!BB", _FINAL | opcode, size)
    if size < 1 << 16:
        return struct.pack("!BBH", _FINAL | opcode, 126, size)
    return struct.pack("!BBQ", _FINAL | opcode, 127, size)


def _unmask(payload: bytearray, mask: bytearray) -> None:
    whole = len(payload) // 4
    words = np.frombuffer(payload, np.uint32, whole)
    words ^= np.frombuffer(mask, np.uint32)[0]
    for index in range(4 * whole, len(payload)):
        payload[index] ^= mask[index & 3]
