"""Open-loop load: requests are due at fixed times, whatever the server does.

A closed loop waits for a reply before it asks again, so a server that stalls for a second is asked
nothing in that second and looks slow once ("coordinated omission"). Here latency counts from when
a request was due: everything that was due in the stall is late by what was left of it. The time
from sending to reply is kept beside it.
Source of the correction: G. Tene, wrk2 and "How NOT to Measure Latency".
"""

import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from jetson.control.loop_clock import LoopClock, MonotonicClock
from jetson.errors import RefusedSetting
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

Arrivals = Literal["constant", "poisson"]
ARRIVALS = ("constant", "poisson")
# Sends the request of a number over one connection and waits for its reply.
Ask = Callable[[int], object]
# So that every thread waits for its first request before that is due.
_LEAD_S = 0.1
_MOST_REQUESTS = 5_000_000
_MOST_CLIENTS = 1024


@dataclass(frozen=True)
class LoadPlan:
    """When requests are due, and over how many connections they go.

    Raises:
        RefusedSetting: a value is out of range, or no request would be due.
    """

    rate_hz: float
    duration_s: float
    # Connections; each carries one request at a time, as the protocols do.
    clients: int = 1
    # "constant": as far apart as a robot's are; "poisson": those of many robots that do not know
    # of each other.
    arrivals: Arrivals = "constant"
    seed: int = 0
    # How long after the last request was due late ones are still sent.
    grace_s: float = 10.0

    def __post_init__(self) -> None:
        limits = {
            "rate_hz": (self.rate_hz, 1e-3, 1e5),
            "duration_s": (self.duration_s, 1e-3, 1e6),
            "clients": (self.clients, 1, _MOST_CLIENTS),
            "grace_s": (self.grace_s, 0, 1e6),
        }
        for name, (value, low, high) in limits.items():
            if not (math.isfinite(value) and low <= value <= high):
                raise RefusedSetting(f"{name} must be in {low:g} to {high:g}, got {value:g}")
        if self.arrivals not in ARRIVALS:
            raise RefusedSetting(f"arrivals must be one of {ARRIVALS}, got {self.arrivals!r}")
        expected = self.rate_hz * self.duration_s
        if not 1 <= expected <= _MOST_REQUESTS:
            raise RefusedSetting(
                f"{self.rate_hz:g} Hz for {self.duration_s:g} s are {expected:g} requests; "
                f"from 1 to {_MOST_REQUESTS} can be measured"
            )

    def due_s(self) -> NDArray[np.float64]:
        """Return when each request is due, seconds from the start.  float64 [n]"""
        expected = self.rate_hz * self.duration_s
        if self.arrivals == "constant":
            return np.arange(round(expected)) / self.rate_hz
        # The first is due at once; gaps for more than will be needed, nine times in ten million.
        count = int(expected + 5 * math.sqrt(expected) + 10)
        gaps = np.random.default_rng(self.seed).exponential(1 / self.rate_hz, count)
        due = np.concatenate([[0.0], np.cumsum(gaps)])
        return due[due < self.duration_s]


@dataclass(frozen=True)
class LoadTimes:
    """What became of every request; seconds from the start.  float64 [n] each"""

    due_s: NDArray[np.float64]
    # When a connection was free for it, or would have been: with `done_s` where it was given up.
    free_s: NDArray[np.float64]
    # When it was sent; NaN where it never was.
    sent_s: NDArray[np.float64]
    # When its reply or its failure was there.
    done_s: NDArray[np.float64]
    # Number of the request -> why it got no actions; requests never sent are not among them.
    failures: Mapping[int, str]
    # What the generator's process computed meanwhile.
    cpu_s: float


def run_load(
    asks: Sequence[Ask],
    plan: LoadPlan,
    clock: LoopClock | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    cpu_now_s: Callable[[], float] = time.process_time,
) -> LoadTimes:
    """Send every request when it is due, or as soon after as a connection is free.

    Args:
        asks: one per connection; raises QvlaError for a request that fails.
        plan: when requests are due.
        clock: the machine's by default.
        on_progress: called with (requests done, requests in all), by the thread that sent one.
        cpu_now_s: CPU time of this process so far.
    """
    cpu_start_s = cpu_now_s()
    due_s = plan.due_s()
    run = _Run(due_s, float(due_s[-1]) + plan.grace_s, clock or MonotonicClock(), on_progress)
    with ThreadPoolExecutor(len(asks), thread_name_prefix="qvla-load") as threads:
        working = [threads.submit(run.work, ask) for ask in asks]
        try:
            for one in working:
                one.result()
        finally:
            # After Ctrl-C, or a failure of our own, nothing more is sent.
            run.stopping.set()
    return LoadTimes(
        due_s, run.free_s, run.sent_s, run.done_s, run.failures, cpu_now_s() - cpu_start_s
    )


class _Run:
    """Shared by the threads; each request's entries are written by the one that sent it."""

    def __init__(
        self,
        due_s: NDArray[np.float64],
        end_s: float,
        clock: LoopClock,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self.stopping = threading.Event()
        self.free_s, self.sent_s, self.done_s = (np.full(len(due_s), np.nan) for _ in range(3))
        self.failures: dict[int, str] = {}
        self._due_s, self._end_s = due_s, end_s
        self._clock, self._on_progress = clock, on_progress
        self._start_s = clock.now_s() + _LEAD_S
        # Handing out a number is one step to the interpreter.
        self._next, self._replies = itertools.count(), itertools.count(1)

    def work(self, ask: Ask) -> None:
        """Send requests until there are none left."""
        while (index := next(self._next)) < len(self._due_s) and not self.stopping.is_set():
            free_s = self.free_s[index] = self._now_s()
            if free_s > self._end_s:
                self.done_s[index] = free_s
                continue
            self._clock.sleep_until(self._start_s + self._due_s[index])
            self.sent_s[index] = self._now_s()
            try:
                ask(index)
            except QvlaError as error:
                self.failures[index] = f"{type(error).__name__}: {error}"
            self.done_s[index] = self._now_s()
            if self._on_progress is not None:
                self._on_progress(next(self._replies), len(self._due_s))

    def _now_s(self) -> float:
        return self._clock.now_s() - self._start_s


def random_observations(
    contract: PolicyContract, side: int | None, count: int = 16, seed: int = 0
) -> list[Observation]:
    """Return observations of noise that a contract allows.

    Args:
        contract: what the policy takes.
        side: pixels of a side of images; None for the size that the contract says.
        count: of the observations.
        seed: of the noise.
    """
    rng = np.random.default_rng(seed)
    shape = (*(contract.frame_size if side is None else (side, side)), 3)
    return [
        Observation(
            {name: rng.integers(0, 256, shape, np.uint8) for name in contract.cameras},
            "pick up the object",
            rng.uniform(-1, 1, contract.state_dim).astype(np.float32),
        )
        for _ in range(count)
    ]
