"""The clock the control loop lives by; injected, so that tests run in virtual time."""

import time
from dataclasses import dataclass
from typing import Protocol


class LoopClock(Protocol):
    """Monotonic seconds, and waiting for a moment of them."""

    def now_s(self) -> float:
        """Return seconds since some fixed moment; never goes back."""
        ...

    def sleep_until(self, deadline_s: float) -> None:
        """Return at or after that moment; at once if it has passed."""
        ...


def boot_time_s() -> float:
    """Return seconds since this machine started, those it was suspended included.

    `time.monotonic` stands still while a machine sleeps, so that a picture from before would look
    fresh afterwards (clock_gettime(2): CLOCK_BOOTTIME against CLOCK_MONOTONIC).
    """
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class MonotonicClock:
    """The machine's clock since it started: never goes back, and counts what it slept."""

    def now_s(self) -> float:
        """Return `boot_time_s()`."""
        return boot_time_s()

    def sleep_until(self, deadline_s: float) -> None:
        """Sleep until an absolute deadline, so that what a step took never adds up."""
        while (left_s := deadline_s - boot_time_s()) > 0:
            time.sleep(left_s)


@dataclass
class SimulatedClock:
    """Time that passes only by sleeping: runs as fast as the machine can, with equal results."""

    time_s: float = 0.0

    def now_s(self) -> float:
        """Return the simulated time."""
        return self.time_s

    def sleep_until(self, deadline_s: float) -> None:
        """Jump to the deadline."""
        self.time_s = max(self.time_s, deadline_s)
