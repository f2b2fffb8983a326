"""The driver's end of `qvla run --commands stdout`: takes the newest command, never an old one.

A reference for robot drivers, and all they need of this package:

    reader = CommandReader(process.stdout, dimensions=7)
    while True:
        command = reader.read(timeout_s=0.1)
        if command is None:
            robot.stop()  # nothing new, or only what is too old by now
            if reader.is_over:
                break
        else:
            robot.move(command.action)

A driver that was held up finds commands that are too old: their deadline has passed, and they are
refused. On the machine that sends, both read one clock (CLOCK_BOOTTIME, which counts suspend).
Over a network the clocks differ by a constant; the reader takes the quickest line so far for one
that took no time, and counts everybody's delay from there.
"""

import json
import math
import os
import select
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from jetson.control.loop_clock import boot_time_s
from jetson.control.sinks import Command

# A command takes hundreds of bytes.
_MAX_LINE_BYTES = 1 << 16


@dataclass
class ReaderCounters:
    """What became of the lines."""

    # Commands handed out.
    taken: int = 0
    # Commands that a newer one had already replaced.
    replaced: int = 0
    # Commands whose deadline had passed.
    expired: int = 0
    # Lines that one look found behind another: the pipe of `qvla run` never holds a second, so a
    # writer that kept to it leaves this 0.
    queued: int = 0
    # Lines that are no command of this robot.
    malformed: int = 0


class CommandReader:
    """Reads commands from a pipe; single-threaded."""

    def __init__(
        self,
        stream: IO[Any],
        dimensions: int,
        same_machine: bool = True,
        now_s: Callable[[], float] = boot_time_s,
    ) -> None:
        """Read a stream by its descriptor.

        Args:
            stream: what `qvla run` writes its commands to.
            dimensions: numbers of an action; others are malformed.
            same_machine: whether the writer reads this machine's clock.
            now_s: the clock.
        """
        self.counters = ReaderCounters()
        # Whether the writer has closed the pipe.
        self.is_over = False
        self._stream = stream
        self._dimensions = dimensions
        self._now_s = now_s
        # This clock's seconds less the writer's, at most.
        self._offset_s = 0.0 if same_machine else math.inf
        self._same_machine = same_machine
        self._pending = bytearray()

    def read(self, timeout_s: float = 0.0) -> Command | None:
        """Return the newest command that may still be executed; None if there is none.

        Args:
            timeout_s: how long to wait for a line.

        Raises:
            OSError: the pipe cannot be read.
        """
        newest: Command | None = None
        for line in self._lines(timeout_s):
            command = self._command(line)
            if command is None:
                self.counters.malformed += 1
                continue
            if not self._same_machine:
                self._offset_s = min(self._offset_s, self._now_s() - command.sent_s)
            if newest is not None:
                self.counters.replaced += 1
            newest = command
        if newest is None:
            return None
        if self._now_s() - self._offset_s > newest.deadline_s:
            self.counters.expired += 1
            return None
        self.counters.taken += 1
        return newest

    def _lines(self, timeout_s: float) -> list[bytes]:
        """Return all whole lines that are there, after waiting for the first."""
        descriptor, wait_ms = self._stream.fileno(), max(0.0, timeout_s * 1000.0)
        ready = select.poll()
        ready.register(descriptor, select.POLLIN)
        while not self.is_over and ready.poll(wait_ms):
            received = os.read(descriptor, _MAX_LINE_BYTES)
            self.is_over = not received
            self.counters.queued += max(0, received.count(b"\n") - 1)
            self._pending += received
            wait_ms = 0.0
            if len(self._pending) > 2 * _MAX_LINE_BYTES and b"\n" not in self._pending:
                self._pending.clear()
                self.counters.malformed += 1
        *lines, rest = bytes(self._pending).split(b"\n")
        self._pending = bytearray(rest)
        return lines

    def _command(self, line: bytes) -> Command | None:
        """Return what a line says, or None if it is no command of this robot."""
        try:
            value = json.loads(line)
            action = np.asarray(value["action"], np.float32)
            observed_s = value["observed_s"]
            command = Command(
                slot=int(value["slot"]),
                action=_finite(action, self._dimensions),
                sent_s=float(value["sent_s"]),
                observed_s=None if observed_s is None else float(observed_s),
                state=str(value["state"]),
                deadline_s=float(value["deadline_s"]),
            )
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
            return None
        times_s = (command.sent_s, command.deadline_s, command.observed_s or 0.0)
        return command if all(map(math.isfinite, times_s)) else None


def _finite(action: NDArray[np.float32], dimensions: int) -> NDArray[np.float32]:
    if action.shape != (dimensions,) or not np.isfinite(action).all():
        raise ValueError("no action of this robot")
    return action
