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


class MonotonicClock:
    """The machine's monotonic clock."""

    def now_s(self) -> float:
        """Return `time.monotonic()`."""
        return time.monotonic()

    def sleep_until(self, deadline_s: float) -> None:
        """Sleep until an absolute deadline, so that what a step took never adds up."""
        while (left_s := deadline_s - time.monotonic()) > 0:
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
