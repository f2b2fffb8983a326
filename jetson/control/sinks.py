"""Where commands go."""

import fcntl
import json
import os
import stat
import struct
import termios
from dataclasses import dataclass
from typing import Protocol, TextIO

import numpy as np
from numpy.typing import NDArray

from jetson.errors import CommandNotTaken


@dataclass(frozen=True)
class Command:
    """One command, as it is sent."""

    slot: int
    # Within the limits and finite.  float32 [dim]
    action: NDArray[np.float32]
    # When it is sent, seconds of the loop's clock.
    sent_s: float
    # When the observation it comes from was taken, seconds of the loop's clock; None for a
    # command that holds, ramps or ends.
    observed_s: float | None
    # Value of the loop's state.
    state: str
    # Until when its execution may begin, seconds of the loop's clock.
    deadline_s: float

    @property
    def age_ms(self) -> float:
        """Age of the observation behind it when it is sent; 0 where there is none."""
        return 0.0 if self.observed_s is None else (self.sent_s - self.observed_s) * 1000.0


class Sink(Protocol):
    """The robot. Called from the control thread, at slots only: must not wait.

    What executes the commands must itself stop the robot when they cease to come: a process that
    is killed, or a board without power, sends no safe action.
    """

    def send(self, command: Command) -> None:
        """Execute one command; an exception ends the run.

        Raises:
            CommandNotTaken: the robot has not yet taken the command before; this one is dropped,
                and the run goes on.
        """
        ...

    def close(self) -> None:
        """Release the connection; the last command was the safe one."""
        ...


class NullSink:
    """No robot: a dry run on a camera or an episode."""

    def send(self, command: Command) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing: nothing is open."""


class StreamSink:
    """One JSON object a line and command: for a robot driver behind a pipe.

    A pipe holds 64 KiB, hundreds of commands; a driver that paused would afterwards execute them
    all at once. So a line is written only when the one before it was read: the pipe holds one
    command, and that carries the moment after which it must not be executed any more
    (`jetson.clients.command_reader` keeps to it).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._unread = _unread_request(stream)

    def send(self, command: Command) -> None:
        """Write one line, unless the driver has not read the last one.

        Raises:
            CommandNotTaken: it has not.
            OSError: the driver is gone.
        """
        if self._unread is not None and _queued_bytes(self._stream.fileno(), self._unread):
            raise CommandNotTaken("the driver has not read the command before this one")
        value = {
            "slot": command.slot,
            "action": command.action.tolist(),
            "sent_s": command.sent_s,
            "observed_s": command.observed_s,
            "age_ms": command.age_ms,
            "deadline_s": command.deadline_s,
            "state": command.state,
        }
        self._stream.write(json.dumps(value, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Do nothing: the stream is the caller's."""


def _unread_request(stream: TextIO) -> int | None:
    """Return the ioctl that counts bytes nobody has read; None where nobody need read them."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except OSError:  # in memory
        return None
    if stat.S_ISFIFO(mode):
        return termios.FIONREAD
    if stat.S_ISSOCK(mode) or stream.isatty():
        return termios.TIOCOUTQ  # SIOCOUTQ has the same number
    return None


def _queued_bytes(descriptor: int, request: int) -> int:
    answer = fcntl.ioctl(descriptor, request, struct.pack("i", 0))
    return int(struct.unpack("i", answer)[0])
