"""Where commands go."""

import json
from dataclasses import dataclass
from typing import Protocol, TextIO

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Command:
    """One command, as it is sent."""

    slot: int
    # Within the limits and finite.  float32 [dim]
    action: NDArray[np.float32]
    # When it is sent, monotonic seconds.
    sent_s: float
    # When the observation it comes from was taken, monotonic seconds; None for a command that
    # holds, ramps or ends.
    observed_s: float | None
    # Value of the loop's state.
    state: str


class Sink(Protocol):
    """The robot. Called from the control thread, at slots only: must not wait.

    What executes the commands must itself stop the robot when they cease to come: a process that
    is killed, or a board without power, sends no safe action.
    """

    def send(self, command: Command) -> None:
        """Execute one command; an exception ends the run."""
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
    """One JSON object a line and command, flushed: for a robot driver behind a pipe."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def send(self, command: Command) -> None:
        """Write one line.

        Raises:
            OSError: the driver is gone.
        """
        value = {
            "slot": command.slot,
            "action": command.action.tolist(),
            "sent_s": command.sent_s,
            "observed_s": command.observed_s,
            "state": command.state,
        }
        self._stream.write(json.dumps(value, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        """Do nothing: the stream is the caller's."""
