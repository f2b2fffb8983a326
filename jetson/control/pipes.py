"""Observations of a remote client through a pipe: no port, no protocol of its own.

A line is the body of a `POST /act`: OpenVLA's or OFT's JSON, which their clients already write.
With `StreamSink` on the other end the robot's computer runs the policy of another machine as
`ssh board qvla run BUNDLE --source stdin --commands stdout`: authenticated and encrypted by ssh.
"""

import os
import select
import socket
import threading
from collections.abc import Iterator
from typing import BinaryIO

from jetson.control.loop_clock import LoopClock
from jetson.control.sources import PushedSource, TimedObservation
from jetson.errors import RequestTooLarge
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.wire import decode_request

# As the server's default.
_MAX_LINE_BYTES = 32 << 20
_READ_BYTES = 1 << 16


class PipedSource:
    """Takes observations from a stream of lines; ends with it.

    An observation's age counts from the arrival of its line: the client's clock is another.
    """

    def __init__(
        self,
        stream: BinaryIO,
        contract: PolicyContract,
        clock: LoopClock,
        max_line_bytes: int = _MAX_LINE_BYTES,
    ) -> None:
        """Start reading.

        Args:
            stream: a pipe, socket, terminal or file; read by its descriptor.
            contract: of the policy.
            clock: of the loop.
            max_line_bytes: of one observation.
        """
        self._stream = stream
        self._contract = contract
        self._clock = clock
        self._max_line_bytes = max_line_bytes
        self._newest = PushedSource(clock)
        self._error: Exception | None = None
        # Wakes the thread when nothing comes any more: one that still waited for a line when the
        # interpreter ends would abort the process.
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._watch, name="qvla-stdin", daemon=True)
        self._thread.start()

    def read(self) -> TimedObservation | None:
        """Return the newest observation; raise, once, what was wrong with a line.

        Raises:
            WireError: a line is not the JSON of a request.
            InvalidObservation: it does not fit the policy.
            RequestTooLarge: it is too long; nothing more is read.
        """
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._newest.read()

    @property
    def is_over(self) -> bool:
        """Whether the client has closed the pipe."""
        return self._newest.is_over

    def close(self) -> None:
        """End the thread; the stream stays open: it is the caller's."""
        self._wake.close()
        self._thread.join()
        self._woken.close()

    def _watch(self) -> None:
        try:
            for line in self._lines():
                self._take(line, self._clock.now_s())
        except (OSError, ValueError, RequestTooLarge) as error:  # or closed under the reader
            self._error = error
        self._newest.end()

    def _lines(self) -> Iterator[bytes]:
        """Yield whole lines as they come, and what follows the last one; ends when woken."""
        descriptor, pending = self._stream.fileno(), bytearray()
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        ready.register(self._woken, select.POLLIN)
        while self._woken.fileno() not in dict(ready.poll()):
            received = os.read(descriptor, _READ_BYTES)
            start, end = len(pending), 0
            pending += received
            while (newline := pending.find(b"\n", max(start, end))) >= 0:
                yield self._short(pending[end:newline])
                end = newline + 1
            del pending[:end]
            self._short(pending)
            if not received:
                if pending:
                    yield bytes(pending)
                return

    def _short(self, line: bytearray) -> bytes:
        if len(line) > self._max_line_bytes:
            raise RequestTooLarge(
                f"a line may have {self._max_line_bytes} bytes; send smaller images"
            )
        return bytes(line)

    def _take(self, line: bytes, arrived_s: float) -> None:
        try:
            observation = decode_request(line, self._contract).observation
        except Exception as error:  # whatever a client sends, the next line may be right
            self._error = error
        else:
            self._newest.push(observation, arrived_s)
