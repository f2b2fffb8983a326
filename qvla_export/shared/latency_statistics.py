"""Figures of latency samples: what percentiles, jitter and deadline misses mean here. numpy only.

The robot's profile and the host's report both compute them from the raw samples.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import QvlaError

# Of latency files. 2: spans inside spans, when each action started, load time, deadline.
LATENCY_FORMAT = "qvla.latency/2"
PERCENTS = (50.0, 90.0, 99.0, 99.9)

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Jitter:
    """How much a latency varies, milliseconds."""

    # p99 - p50: how much later than usual an unlucky action is. None with less than 100 samples.
    spread_ms: float | None
    # Median of |sample - the one before|: how much one action differs from the next. None of one.
    step_ms: float | None


@dataclass(frozen=True)
class Deadline:
    """Until when a chunk must be there for the robot to move on time.

    Raises:
        QvlaError: the rate is no number above 0, or nothing is executed of a chunk.
    """

    # Commands a second.
    rate_hz: float
    # Commands that are sent while the next chunk is computed. 1: the robot waits for every chunk
    # and only the command that is due next may be late. The steps of a chunk that are executed:
    # inference runs beside them (`qvla run`), and is late once they have run out.
    execute: int = 1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.rate_hz) and self.rate_hz > 0) or self.execute < 1:
            raise QvlaError(
                f"a deadline needs a rate above 0 Hz and at least 1 executed action, got "
                f"{self.rate_hz} Hz and {self.execute}"
            )

    @property
    def ms(self) -> float:
        """Milliseconds that an action may take."""
        return 1000.0 * self.execute / self.rate_hz

    def misses(self, total_ms: Samples) -> "Misses":
        """Return how many of the actions took longer."""
        late = total_ms > self.ms
        # Lengths of the runs of True: distances between the edges of the padded mask.
        edges = np.flatnonzero(np.diff(np.concatenate([[False], late, [False]]).astype(np.int8)))
        longest = int((edges[1::2] - edges[::2]).max(initial=0))
        return Misses(int(late.sum()), len(total_ms), longest)


@dataclass(frozen=True)
class Misses:
    """Actions later than a deadline."""

    count: int
    actions: int
    # Most in a row: what the robot must bridge.
    longest_run: int

    @property
    def share(self) -> float:
        """Late actions over all."""
        return self.count / self.actions


def supports(count: int, percent: float) -> bool:
    """Say whether a percentile of so many samples means anything: one lies beyond it.

    p90 needs 10 samples, p99 100, p99.9 1,000. With fewer, all that is known is the largest.
    """
    return count * (100 - percent) >= 100 * (1 - 1e-9)


def percentile(samples: Samples, percent: float) -> float | None:
    """Return a percentile, linearly interpolated; None where the samples do not support it."""
    if not supports(len(samples), percent):
        return None
    return float(np.percentile(samples, percent))


def percentile_text(samples: Samples, percent: float, digits: int = 2) -> str:
    """Return a percentile for readers: "4.20", or "max of 200" where there is none."""
    value = percentile(samples, percent)
    return f"max of {len(samples)}" if value is None else f"{value:.{digits}f}"


def tail(samples: Samples) -> tuple[str, float]:
    """Return the name and value of what shows the slow end: "p99", or "max" of fewer samples."""
    p99 = percentile(samples, 99)
    return ("max", float(samples.max())) if p99 is None else ("p99", p99)


def jitter(samples: Samples) -> Jitter:
    """Return how much samples vary; they must be in the order taken."""
    p99 = percentile(samples, 99)
    steps = np.abs(np.diff(samples))
    return Jitter(
        None if p99 is None else p99 - float(np.median(samples)),
        float(np.median(steps)) if steps.size else None,
    )


def summary(samples: Samples) -> dict[str, float | None]:
    """Return p50, p90, p99, p99.9, max and jitter; None is what the samples do not support."""
    found = jitter(samples)
    percentiles = {f"p{percent:g}": percentile(samples, percent) for percent in PERCENTS}
    return {
        **percentiles,
        "max": float(samples.max()),
        "jitter_spread": found.spread_ms,
        "jitter_step": found.step_ms,
    }
