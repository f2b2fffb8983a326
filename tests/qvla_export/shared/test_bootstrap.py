"""Bootstrap intervals and latency figures: what they mean, on samples whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from qvla_export.shared.bootstrap import (
    block_length,
    compare_quantiles,
    has_interval,
    needed_samples,
    ratio_of_medians,
)
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.latency_statistics import (
    Deadline,
    jitter,
    percentile_text,
    summary,
    supports,
)

Samples = NDArray[np.float64]
times = arrays(np.float64, st.integers(1, 60), elements=st.floats(0.01, 1e4))


def autocorrelated(generator: np.random.Generator, size: int, rho: float) -> Samples:
    """Latencies around 10 ms whose logarithm is an AR(1) process of standard deviation 0.2."""
    noise = generator.normal(size=size)
    state = np.zeros(size)
    for i in range(1, size):
        state[i] = rho * state[i - 1] + noise[i]
    return 10 * np.exp(0.2 * np.sqrt(1 - rho**2) * state)


def coverage(rho: float) -> int:
    """How many of 100 intervals of a ratio of 2 hold it."""
    covered = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        base, new = (autocorrelated(generator, 300, rho) for _ in range(2))
        found = ratio_of_medians(2 * new, base, False, seed, resamples=300)
        covered += found.low <= 2.0 <= found.high
    return covered


@pytest.mark.parametrize("rho", [0.0, 0.6])
def test_intervals_cover_about_as_often_as_they_say(rho: float) -> None:
    # Seeded: the same counts everywhere. 95 is what they say; the block bootstrap is a bit short
    # of it where samples hang together, single draws would be far off (about 65 at 0.6).
    assert 88 <= coverage(rho) <= 100


def test_blocks_are_long_where_samples_hang_together() -> None:
    lengths = {}
    for rho in (0.0, 0.3, 0.6, 0.9):
        drawn = (autocorrelated(np.random.default_rng(seed), 400, rho) for seed in range(20))
        lengths[rho] = np.mean([block_length(samples) for samples in drawn])
    assert lengths[0.0] < 2 < lengths[0.3] < lengths[0.6] < lengths[0.9]
    assert block_length(np.full(50, 3.0)) == 1
    # One outlier among independent samples changes nothing: ranks decide.
    calm = np.random.default_rng(0).normal(10, 1, 200)
    assert block_length(np.where(np.arange(200) == 70, 1e6, calm)) <= 2 * block_length(calm)


def test_quantiles_of_long_profiles_are_covered_too() -> None:
    covered = dict.fromkeys((50.0, 90.0, 99.0), 0)
    for seed in range(40):
        base, new = np.random.default_rng(seed).lognormal(0, 0.3, (2, 1000))
        for change in compare_quantiles(base, 2 * new, tuple(covered), seed=seed, resamples=200):
            assert change.ratio is not None and change.difference_ms is not None
            covered[change.percent] += change.ratio.low <= 2.0 <= change.ratio.high
    assert min(covered.values()) >= 35


@settings(max_examples=25, deadline=None)
@given(times, st.integers(0, 5))
def test_a_profile_is_not_slower_than_itself(samples: Samples, seed: int) -> None:
    alone = ratio_of_medians(samples, samples, False, seed, 400)
    assert alone.value == 1 and alone.low <= 1 <= alone.high
    paired = ratio_of_medians(samples, samples, True, seed, 400)
    assert paired.low == paired.value == paired.high == 1


@settings(max_examples=25, deadline=None)
@given(times, st.floats(0.1, 10))
def test_pairs_of_one_factor_give_it_exactly(samples: Samples, factor: float) -> None:
    found = ratio_of_medians(samples * factor, samples, True, 0, 200)
    assert (found.low, found.high) == pytest.approx((factor, factor))


def test_the_same_seed_draws_the_same() -> None:
    base, new = np.random.default_rng(1).lognormal(0, 0.3, (2, 120))
    percents = (50.0, 90.0)
    same = [compare_quantiles(base, new, percents, seed=4) for _ in range(2)]
    assert same[0] == same[1] != compare_quantiles(base, new, percents, seed=5)


def test_long_profiles_are_drawn_in_parts_of_one_result() -> None:
    samples = np.random.default_rng(2).lognormal(0, 0.3, 30_000)
    found = ratio_of_medians(samples, samples, False, 0, 150)
    assert found.low < 1 < found.high < 1.02


def test_quantiles_without_enough_samples_have_no_interval() -> None:
    assert [needed_samples(p) for p in (50, 90, 99, 99.9)] == [20, 100, 1000, 10_000]
    assert has_interval(1000, 99) and not has_interval(999, 99)
    median, high = compare_quantiles(np.arange(1.0, 91), np.arange(2.0, 92), (50.0, 90.0))
    assert median.ratio is not None
    assert (high.ratio, high.difference_ms) == (None, None) and high.new_ms == high.base_ms + 1
    (still,) = compare_quantiles(np.zeros(50), np.ones(50), (50.0,))
    assert still.ratio is None and still.difference_ms is not None


def test_percentiles_that_samples_do_not_support_are_not_invented() -> None:
    assert [supports(n, p) for n, p in ((9, 90), (10, 90), (999, 99.9), (1000, 99.9))] == [
        *(False, True, False, True)
    ]
    samples = np.arange(1.0, 201.0)
    assert percentile_text(samples, 99.9) == "max of 200"
    assert percentile_text(samples, 50) == "100.50"
    found = summary(samples)
    assert found["p99.9"] is None and found["max"] == 200 and found["p99"] == pytest.approx(198.01)


def test_jitter_is_spread_and_step() -> None:
    slow_drift = jitter(np.arange(1.0, 201.0))
    assert slow_drift.step_ms == 1 and slow_drift.spread_ms == pytest.approx(97.51)
    flutter = jitter(np.tile([1.0, 199.0], 100))
    assert flutter.step_ms == 198
    assert jitter(np.ones(1)).step_ms is None and jitter(np.ones(99)).spread_ms is None


def test_a_deadline_is_one_period_or_the_executed_part_of_a_chunk() -> None:
    total_ms = np.array([10.0, 30.0, 30.0, 10.0, 30.0, 20.0])
    waiting = Deadline(50.0).misses(total_ms)
    assert (waiting.count, waiting.longest_run, waiting.share) == (3, 2, 0.5)
    # Two commands are sent meanwhile: 40 ms.
    assert Deadline(50.0, execute=2).misses(total_ms).count == 0
    assert Deadline(1000.0).misses(total_ms).longest_run == 6
    for rate_hz, execute in ((0.0, 1), (float("nan"), 1), (50.0, 0)):
        with pytest.raises(QvlaError, match="rate above 0 Hz"):
            Deadline(rate_hz, execute)
