"""Latencies for a terminal: of a run and of what changed between two."""

from collections.abc import Iterable, Iterator

import numpy as np

from engines.layer_time_texts import layer_texts
from jetson.doctor.speed import slow_settings
from jetson.latency.comparison import LatencyComparison
from jetson.latency.profile import LatencyProfile
from jetson.latency.regression import LatencyChange
from qvla_export.shared.bootstrap import Interval
from qvla_export.shared.latency_statistics import PERCENTS, jitter, percentile_text
from qvla_export.shared.tables.text_table import TextTable

_NONE = "-"
_TWO_RUNS = (
    "note: the intervals know what varies within a run, not from run to run; to be sure, profile "
    "both in one run and compare its pairs: qvla profile OLD NEW --output RUN.json"
)


def profile_texts(comparison: LatencyComparison) -> Iterator[str | TextTable]:
    """Yield the spans of every profile, starts and deadlines of all, layers where timed."""
    for profile in comparison.profiles:
        yield _spans(profile)
    yield _starts(comparison)
    if comparison.cold_starts:
        yield _memory(comparison)
    for name, times in comparison.layers.items():
        yield from layer_texts(name, times)
    if slow := slow_settings(comparison.profiles[0].board_before):
        yield f"slower than it could be, see qvla doctor: {slow}"


def change_texts(changes: Iterable[LatencyChange], two_runs: bool) -> Iterator[str | TextTable]:
    """Yield what changed in every span, and what a reader of it must know."""
    for change in changes:
        yield _change(change)
        for note in change.notes:
            yield f"note: {note}"
    if two_runs:
        yield _TWO_RUNS


def _change(change: LatencyChange) -> TextTable:
    how = "rounds of one run" if change.paired else "two runs"
    columns = ("span", "", "before, ms", "after, ms", "difference, ms", "ratio", "verdict")
    title = f"{change.base} -> {change.new}, {how}, 95 % block bootstrap"
    # Only the total is judged by the exit code; spans are there to find the cause.
    return TextTable(columns, title=title, words=("verdict",)).with_rows(
        (
            "" if index else span,
            f"p{row.percent:g}",
            f"{row.base_ms:.3f}",
            f"{row.new_ms:.3f}",
            _interval(row.difference_ms, row.new_ms - row.base_ms),
            _interval(row.ratio, row.new_ms / row.base_ms if row.base_ms else None),
            change.verdict(row),
        )
        for span, rows in change.spans.items()
        for index, row in enumerate(rows)
    )


def _spans(profile: LatencyProfile) -> TextTable:
    columns = (*(f"p{percent:g}" for percent in PERCENTS), "max", "p99 - p50", "step")
    title = f"{profile.name} ({profile.transport}), {len(profile.started_ms)} actions, ms"
    spreads = {span: jitter(samples) for span, samples in profile.samples_ms.items()}
    return TextTable(("span", *columns), title=title).with_rows(
        (
            span,
            *(percentile_text(samples, percent) for percent in PERCENTS),
            f"{samples.max():.2f}",
            _number(spreads[span].spread_ms),
            _number(spreads[span].step_ms),
        )
        for span, samples in profile.samples_ms.items()
    )


def _starts(comparison: LatencyComparison) -> TextTable:
    deadline = comparison.deadline
    columns = ["policy", "load, ms", "first action, ms", "load + first, ms", "new process, ms"]
    if deadline is not None:
        columns += [f"later than {deadline.ms:.1f} ms", "most in a row"]
    rows = (_start(comparison, profile) for profile in comparison.profiles)
    return TextTable(tuple(columns), title="starts and deadlines").with_rows(rows)


def _memory(comparison: LatencyComparison) -> TextTable:
    columns = ("policy", "memory, MB", "GPU memory, MB")
    return TextTable(columns, title="peak memory of a process that holds one policy").with_rows(
        (
            name,
            _largest(start.resident_bytes for start in starts),
            _largest(start.device_bytes for start in starts),
        )
        for name, starts in comparison.cold_starts.items()
    )


def _start(comparison: LatencyComparison, profile: LatencyProfile) -> tuple[str, ...]:
    starts = comparison.cold_starts.get(profile.name, ())
    fresh = float(np.median([start.total_ms for start in starts])) if starts else None
    misses = []
    if comparison.deadline is not None:
        late = comparison.deadline.misses(profile.samples_ms["total"])
        misses = [f"{late.count} ({late.share:.1%})", str(late.longest_run)]
    return (
        profile.name,
        _number(profile.load_ms),
        _number(profile.first_action_ms),
        _number(profile.cold_start_ms),
        f"{_number(fresh)} (of {len(starts)})" if starts else _NONE,
        *misses,
    )


def _largest(sizes: Iterable[int | None]) -> str:
    """Return the largest of some processes' bytes, in MB."""
    known = [size for size in sizes if size is not None]
    return f"{max(known) / 1e6:.1f}" if known else _NONE


def _interval(interval: Interval | None, value: float | None) -> str:
    if interval is None:
        return _NONE if value is None else f"{value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"
