"""Bootstrap intervals of latency quantiles, the only ones of the project. numpy only.

Successive latencies are not independent: clocks, caches and other processes change slowly. So runs
of successive samples are drawn together, the circular block bootstrap (Politis & Romano, 1992);
how long they are follows from the samples' autocorrelation (Politis & White, 2004, corrected by
Patton, Politis & White, 2009), by ranks, so that a single outlier does not decide.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
# Samples on the nearer side of a quantile without which its interval would be too narrow: the
# bootstrap never draws what lies beyond the largest sample.
ENOUGH_BEYOND = 10
# Indices drawn at once, so that long profiles do not fill the memory.
_AT_ONCE = 1 << 21

Samples = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its percentile-bootstrap interval."""

    value: float
    low: float
    high: float
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class QuantileChange:
    """One quantile of a baseline's samples and of others'."""

    # 50 is the median.
    percent: float
    base_ms: float
    new_ms: float
    # new - base and new / base; None where `has_interval` is False, the ratio also where the
    # baseline's quantile is 0.
    difference_ms: Interval | None
    ratio: Interval | None


def has_interval(count: int, percent: float) -> bool:
    """Say whether so many samples support an interval of a quantile."""
    return needed_samples(percent) <= count


def needed_samples(percent: float) -> int:
    """Return how many samples an interval of a quantile needs."""
    return int(np.ceil(round(ENOUGH_BEYOND / (min(percent, 100 - percent) / 100), 6)))


def ratio_of_medians(
    samples: Samples, baseline: Samples, paired: bool, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """Return the median of samples over that of a baseline; below 1 is faster.

    Args:
        samples, baseline: milliseconds in the order taken, float64 [n] and [m].
        paired: whether the i-th of both were taken in the same round; equally many then. What both
            saw at the same moment cancels.
        seed: of the draws.
        resamples: how many.
    """
    draws = _quantiles(baseline, samples, (50.0,), paired, seed, resamples)
    return _interval(float(np.median(samples) / np.median(baseline)), draws[1] / draws[0])


def compare_quantiles(
    base: Samples,
    new: Samples,
    percents: Sequence[float],
    paired: bool = False,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> tuple[QuantileChange, ...]:
    """Return how quantiles of two profiles differ; see `ratio_of_medians` for the arguments."""
    count = min(len(base), len(new))
    known = [percent for percent in percents if has_interval(count, percent)]
    draws = _quantiles(base, new, known, paired, seed, resamples) if known else None
    changes = []
    for percent in percents:
        old, now = float(np.percentile(base, percent)), float(np.percentile(new, percent))
        difference = ratio = None
        if draws is not None and percent in known:
            drawn = draws[:, known.index(percent)]
            difference = _interval(now - old, drawn[1] - drawn[0])
            if old > 0 and drawn[0].min() > 0:
                ratio = _interval(now / old, drawn[1] / drawn[0])
        changes.append(QuantileChange(percent, old, now, difference, ratio))
    return tuple(changes)


def block_length(samples: Samples) -> int:
    """Return how many successive samples are drawn together; 1 where they are independent."""
    n = len(samples)
    ranks = _ranks(samples)
    centred = ranks - ranks.mean()
    if n < 10 or not centred.any():
        return 1
    quiet = max(5, int(np.ceil(np.sqrt(np.log10(n)))))
    longest = min(int(np.ceil(np.sqrt(n))) + quiet, n - 1)
    covariance = np.array([centred[k:] @ centred[: n - k] / n for k in range(longest + 1)])
    loud = np.abs(covariance / covariance[0]) >= 2 * np.sqrt(np.log10(n) / n)
    # The last lag before `quiet` insignificant ones in a row.
    last = next(
        (m for m in range(longest - quiet + 1) if not loud[m + 1 : m + 1 + quiet].any()), longest
    )
    if last == 0:
        return 1
    lags = np.arange(1, min(2 * last, longest) + 1)
    window = np.minimum(1, 2 * (1 - lags / (2 * last)))
    bias = 2 * np.sum(window * lags * covariance[lags])
    variance = 4 / 3 * (covariance[0] + 2 * np.sum(window * covariance[lags])) ** 2
    length = (2 * bias**2 / variance * n) ** (1 / 3) if variance > 0 else n
    return int(np.clip(np.ceil(length), 1, np.ceil(min(3 * np.sqrt(n), n / 3))))


def _quantiles(
    base: Samples,
    new: Samples,
    percents: Sequence[float],
    paired: bool,
    seed: int,
    resamples: int,
) -> NDArray[np.float64]:
    """Return drawn quantiles of both, float64 [2, percents, resamples]."""
    if paired and len(base) != len(new):
        raise ValueError(f"paired samples must be equally many, got {len(base)} and {len(new)}")
    generator = np.random.default_rng(seed)
    blocks = block_length(base), block_length(new)
    parts = []
    for count in _batches(resamples, max(len(base), len(new))):
        if paired:
            rows = _draw(generator, len(base), max(blocks), count)
            drawn = base[rows], new[rows]
        else:
            drawn = (
                base[_draw(generator, len(base), blocks[0], count)],
                new[_draw(generator, len(new), blocks[1], count)],
            )
        parts.append(np.stack([np.percentile(rows, percents, axis=1) for rows in drawn]))
    return np.concatenate(parts, axis=2)


def _draw(
    generator: np.random.Generator, size: int, block: int, resamples: int
) -> NDArray[np.int64]:
    """Return indices [resamples, size] made of blocks of successive ones, around the end."""
    starts = generator.integers(0, size, (resamples, -(-size // block), 1))
    rows: NDArray[np.int64] = (starts + np.arange(block)).reshape(resamples, -1)[:, :size] % size
    return rows


def _batches(resamples: int, size: int) -> Iterator[int]:
    at_once = max(1, _AT_ONCE // size)
    for done in range(0, resamples, at_once):
        yield min(at_once, resamples - done)


def _interval(value: float, drawn: Samples) -> Interval:
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(drawn, [tail, 100 - tail])
    return Interval(value, float(low), float(high))


def _ranks(samples: Samples) -> Samples:
    """Return mean ranks; equal samples share one."""
    _, inverse, counts = np.unique(samples, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Samples = (last - (counts - 1) / 2)[inverse]
    return ranks
