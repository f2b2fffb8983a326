"""A robot's driver, as a process: reads commands from stdin, counts what it should never get.

Run as `python -m qvla_export.pipeline.soak.driver`; writes its counts as JSON when stdin ends.
"""

import json
import sys
from dataclasses import asdict, dataclass

import numpy as np

from jetson.clients.command_reader import CommandReader
from jetson.control.loop_clock import boot_time_s
from jetson.control.sinks import Command
from qvla_export.pipeline.soak.numbered_policy import DIMENSIONS, limits

# Bound of a command's age that the loop is started with.
MAX_AGE_MS = 500.0
_READ_S = 0.1
# Float rounding of a stamp on its way through JSON.
_ROUNDING_S = 1e-6


@dataclass
class CommandCounts:
    """What reached the driver."""

    # Commands that the reader handed out.
    taken: int = 0
    # Of those: older than their bound, with numbers that are not finite, outside the limits.
    too_old: int = 0
    non_finite: int = 0
    out_of_limits: int = 0
    # What the reader refused because its deadline had passed.
    expired: int = 0
    # Commands that the reader passed over for a newer one. No fault: a driver that is stopped
    # between taking a line and looking again finds the one that was written in its place, and
    # is handed that alone. Two in the pipe at once are a burst.
    replaced: int = 0
    # Commands that lay in the pipe behind another, and lines that are no commands.
    bursts: int = 0
    malformed: int = 0

    @property
    def broken(self) -> int:
        """Commands that no driver may get, bursts, and lines that are no commands."""
        return self.too_old + self.non_finite + self.out_of_limits + self.bursts + self.malformed

    def take(self, command: Command, now_s: float) -> None:
        """Count a command that was handed out at a moment."""
        self.taken += 1
        from_s = command.sent_s if command.observed_s is None else command.observed_s
        self.too_old += now_s - from_s > MAX_AGE_MS / 1000.0 + _ROUNDING_S
        bounds = limits()
        if not np.isfinite(command.action).all():
            self.non_finite += 1
        elif (command.action < bounds.low).any() or (command.action > bounds.high).any():
            self.out_of_limits += 1


class _Watch:
    """The driver's clock, and when it was last looked at: a stopped process must not look late."""

    last_s = 0.0

    def now_s(self) -> float:
        """Return the time."""
        self.last_s = boot_time_s()
        return self.last_s


def main() -> None:
    """Read commands until the loop ends."""
    watch, counts = _Watch(), CommandCounts()
    reader = CommandReader(sys.stdin.buffer, DIMENSIONS, now_s=watch.now_s)
    while not reader.is_over:
        command = reader.read(_READ_S)
        if command is not None:
            # By the clock that the reader judged by: later, the process may have been stopped.
            counts.take(command, watch.last_s)
    lines = reader.counters
    counts.expired, counts.replaced = lines.expired, lines.replaced
    counts.bursts, counts.malformed = lines.queued, lines.malformed
    json.dump(asdict(counts), sys.stdout)


if __name__ == "__main__":
    main()
