"""Time all contenders in turn, and what the samples say. numpy only."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.bootstrap import ratio_of_medians

Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as another: quotient of medians, bootstrap interval of 95 %."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} [{self.low:.2f}, {self.high:.2f}]"


def time_in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    on_progress: Callable[[int, int], None] | None = None,
    clock: Clock = "wall",
) -> dict[str, NDArray[np.float64]]:
    """Call everything once a round, in the same order; the first round warms up and is dropped.

    Between two calls of one contender all others run, so its weights have left the caches if the
    others' are larger than those. `on_progress` is called with (rounds done, rounds in all). The
    clock "cpu" is this process's time: with one thread, what a busy machine leaves comparable.

    Returns:
        Milliseconds by name, float64 [rounds].
    """
    now = time.perf_counter_ns if clock == "wall" else time.process_time_ns
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for index in range(rounds + 1):
        for name, call in calls.items():
            start = now()
            call()
            samples[name].append((now() - start) / 1e6)
        if on_progress is not None:
            on_progress(index + 1, rounds + 1)
    return {name: np.array(values[1:]) for name, values in samples.items()}


def speedup(samples: NDArray[np.float64], baseline: NDArray[np.float64], seed: int = 0) -> Ratio:
    """Return how many times as fast as the baseline, whole rounds resampled.

    Args:
        samples, baseline: milliseconds of the same rounds, float64 [rounds].
        seed: of the bootstrap.
    """
    found = ratio_of_medians(baseline, samples, paired=True, seed=seed)
    return Ratio(found.value, found.low, found.high)
