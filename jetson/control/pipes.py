"""Observations of a remote client through a pipe: no port, no protocol of its own.

A line is the body of a `POST /act`: OpenVLA's or OFT's JSON, which their clients already write.
With `StreamSink` on the other end the robot's computer runs the policy of another machine as
`ssh board qvla run BUNDLE --source stdin --commands stdout`: authenticated and encrypted by ssh.
"""

import threading
from typing import BinaryIO

from jetson.control.loop_clock import LoopClock
from jetson.control.sources import PushedSource, TimedObservation
from jetson.errors import RequestTooLarge
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.wire import decode_request

# As the server's default.
_MAX_LINE_BYTES = 32 << 20


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
        self._stream = stream
        self._contract = contract
        self._clock = clock
        self._max_line_bytes = max_line_bytes
        self._newest = PushedSource(clock)
        self._error: Exception | None = None
        # A daemon: nothing can wake a thread that waits for a line.
        threading.Thread(target=self._watch, name="qvla-stdin", daemon=True).start()

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
        """Do nothing: the stream is the caller's."""

    def _watch(self) -> None:
        try:
            while line := self._stream.readline(self._max_line_bytes + 1):
                arrived_s = self._clock.now_s()
                if len(line) > self._max_line_bytes:
                    self._error = RequestTooLarge(
                        f"a line may have {self._max_line_bytes} bytes; send smaller images"
                    )
                    break
                self._take(line, arrived_s)
        except (OSError, ValueError) as error:  # closed under the reader
            self._error = error
        self._newest.end()

    def _take(self, line: bytes, arrived_s: float) -> None:
        try:
            observation = decode_request(line, self._contract).observation
        except Exception as error:  # whatever a client sends, the next line may be right
            self._error = error
        else:
            self._newest.push(observation, arrived_s)
