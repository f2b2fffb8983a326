"""Tables of latencies: of a run, of its layers, of what changed."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table

from qvla_export.shared.latency_statistics import PERCENTS, jitter, percentile_text

if TYPE_CHECKING:
    from engines.layer_times import LayerTimes, TimeShare
    from jetson.latency.comparison import LatencyComparison
    from jetson.latency.profile import LatencyProfile
    from jetson.latency.regression import LatencyChange
    from qvla_export.shared.bootstrap import Interval

_SLOWEST = 15
_NONE = "-"


def profile_tables(comparison: "LatencyComparison") -> Iterator[Table]:
    """Return the spans of every profile, then starts and deadlines of all."""
    for profile in comparison.profiles:
        yield _spans(profile)
    yield _starts(comparison)


def layer_tables(times: "LayerTimes") -> Iterator[Table]:
    """Return the slowest layers, and the time by width and by kind of node."""
    slowest = times.by_layer()
    yield _shares(f"layer, {_SLOWEST} slowest of {len(slowest)}", slowest[:_SLOWEST])
    yield _shares("channels by width", times.by_width())
    yield _shares("kind of node", times.by_op_type())


def layer_heading(name: str, times: "LayerTimes") -> str:
    """Return what the layers' tables are of."""
    text = (
        f"{name}: layers on {times.runtime}, medians of {times.passes} passes, "
        f"{times.total_ms:.2f} ms in all"
    )
    if all(not row.layer for row in times.rows):
        text += "; export the bundle anew: its nodes do not name the policy's layers"
    return text


def change_table(change: "LatencyChange") -> Table:
    """Return every quantile of every span, before and after."""
    how = "rounds of one run" if change.paired else "two runs"
    table = Table(title=f"{change.base} -> {change.new}, {how}, 95 % block bootstrap")
    for column in ("span", "", "before, ms", "after, ms", "difference, ms", "ratio", "verdict"):
        table.add_column(column, justify="left" if column in ("span", "verdict") else "right")
    for span, changes in change.spans.items():
        for index, row in enumerate(changes):
            # Only the total is judged by the exit code; spans are there to find the cause.
            table.add_row(
                "" if index else span,
                f"p{row.percent:g}",
                f"{row.base_ms:.3f}",
                f"{row.new_ms:.3f}",
                _interval(row.difference_ms, row.new_ms - row.base_ms),
                _interval(row.ratio, row.new_ms / row.base_ms if row.base_ms else None),
                change.verdict(row),
            )
    return table


def _spans(profile: "LatencyProfile") -> Table:
    count = len(profile.started_ms)
    table = Table(title=f"{profile.name} ({profile.transport}), {count} actions, ms")
    columns = (*(f"p{percent:g}" for percent in PERCENTS), "max", "p99 - p50", "step")
    for column in ("span", *columns):
        table.add_column(column, justify="left" if column == "span" else "right")
    for span, samples in profile.samples_ms.items():
        spread = jitter(samples)
        table.add_row(
            span,
            *(percentile_text(samples, percent) for percent in PERCENTS),
            f"{samples.max():.2f}",
            _number(spread.spread_ms),
            _number(spread.step_ms),
        )
    return table


def _starts(comparison: "LatencyComparison") -> Table:
    deadline = comparison.deadline
    table = Table(title="starts and deadlines")
    columns = ["load, ms", "first action, ms", "load + first, ms", "new process, ms"]
    if deadline is not None:
        columns += [f"later than {deadline.ms:.1f} ms", "most in a row"]
    for column in ("policy", *columns):
        left = column == "policy"
        table.add_column(column, justify="left" if left else "right", overflow="fold")
    for profile in comparison.profiles:
        starts = comparison.cold_starts.get(profile.name, ())
        fresh = float(np.median([start.total_ms for start in starts])) if starts else None
        row = [
            _number(profile.load_ms),
            _number(profile.first_action_ms),
            _number(profile.cold_start_ms),
            f"{_number(fresh)} (of {len(starts)})" if starts else _NONE,
        ]
        if deadline is not None:
            misses = deadline.misses(profile.samples_ms["total"])
            row += [f"{misses.count} ({misses.share:.1%})", str(misses.longest_run)]
        table.add_row(profile.name, *row)
    return table


def _shares(first: str, shares: "tuple[TimeShare, ...]") -> Table:
    table = Table()
    for column in (first, "nodes", "ms", "share"):
        table.add_column(column, justify="left" if column == first else "right")
    for share in shares:
        table.add_row(share.name, str(share.nodes), f"{share.ms:.3f}", f"{share.share:.1%}")
    return table


def _interval(interval: "Interval | None", value: float | None) -> str:
    if interval is None:
        return _NONE if value is None else f"{value:.3f}"
    return f"{interval.value:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def _number(value: float | None) -> str:
    return _NONE if value is None else f"{value:.2f}"
