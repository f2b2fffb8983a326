"""Figures of what came out: error over time, success, latency, the trade-off."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from qvla_export.report.axes import label_deviations, legend_above, name_point
from qvla_export.report.measured import Latency, Share
from qvla_export.report.run_data import RunData, SettingResult
from qvla_export.report.svg import (
    MUTED,
    PAPER,
    STAGE_COLORS,
    Look,
    log_axis,
    new_figure,
    setting_looks,
    short,
    to_svg,
)
from qvla_export.shared.clock import whole_spans

_NORMAL_95 = 1.96
# Of the axes' diagonal, between two markers of a curve; and columns of a legend.
_MARK_EVERY = 0.18
_COLUMNS = 4
# Points that have their names beside them.
_MOST_NAMES = 7
_EXACT = 1e-8  # a sum below is rounding: the float engine beside the float policy


def draw_deviation(data: RunData, settings: Sequence[SettingResult]) -> str:
    """Draw the mean cumulative deviation along episodes with a 95 % band (Fig. 3)."""
    figure = new_figure(3.3)
    axes = figure.subplots()
    looks = looks_of(data)
    drifting = [s for s in settings if s.rollouts and s.rollouts.cumulative[:, -1].mean() > _EXACT]
    for setting in drifting or settings:
        assert setting.rollouts is not None
        sums = setting.rollouts.cumulative
        decisions = np.arange(1, sums.shape[1] + 1)
        mean = sums.mean(axis=0)
        spread = np.zeros_like(mean)
        if len(sums) > 1:
            spread = _NORMAL_95 * sums.std(axis=0, ddof=1) / np.sqrt(len(sums))
        look = looks[setting.name]
        # A logarithmic axis cannot show a band that reaches zero.
        low = np.maximum(mean - spread, mean / 10)
        axes.fill_between(decisions, low, mean + spread, color=look.color, alpha=0.2, linewidth=0)
        axes.plot(
            decisions,
            mean,
            color=look.color,
            dashes=look.dashes,
            marker=look.marker,
            markevery=_MARK_EVERY,
            label=short(setting.name),
        )
    label_deviations(axes, logarithmic=bool(drifting))
    legend_above(axes, _COLUMNS)
    return to_svg(figure, "deviation")


def draw_success(data: RunData, settings: Sequence[SettingResult]) -> str:
    """Draw the success of each task and setting with Wilson 95 % intervals."""
    tasks = list(dict.fromkeys(t for s in settings if s.rollouts for t in s.rollouts.by_task))
    rows = ["all tasks", *tasks]
    figure = new_figure(0.9 + (0.1 + 0.11 * len(settings)) * len(rows))
    axes = figure.subplots()
    for i, setting in enumerate(settings):
        assert setting.rollouts is not None
        shares = {"all tasks": setting.rollouts.success, **setting.rollouts.by_task}
        offset = 0.7 * ((i + 0.5) / len(settings) - 0.5)
        points = [(row + offset, shares[name]) for row, name in enumerate(rows) if name in shares]
        _interval_dots(axes, points, data, setting.name)
    for row in range(1, len(rows)):
        axes.axhline(row - 0.5, color=MUTED, lw=1.0 if row == 1 else 0.25)
    axes.set_yticks(range(len(rows)), [short(name) for name in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("solved episodes, % (bar: Wilson 95 % interval)")
    legend_above(axes, 5)
    return to_svg(figure, "success")


def draw_latency(data: RunData, settings: Sequence[SettingResult]) -> str:
    """Draw the distribution of the total, and the median of each span."""
    rows = {s.name: s.latency for s in settings if s.latency is not None}
    rows = {**rows, **data.other_latencies}
    figure = new_figure(3.4 + 0.5 + 0.3 * len(rows))
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 0.5 + 0.3 * len(rows)])
    looks = looks_of(data)
    for name, latency in rows.items():
        total = np.sort(latency.samples_ms["total"])
        share = 100 * np.arange(1, len(total) + 1) / len(total)
        look = looks[name]
        upper.step(
            total,
            share,
            where="post",
            color=look.color,
            dashes=look.dashes,
            marker=look.marker,
            markevery=_MARK_EVERY,
            label=short(name),
        )
    upper.set_ylim(0, 101)
    upper.set_ylabel("actions at most this slow, %")
    upper.set_xlabel("milliseconds from request to action")
    legend_above(upper, 3)
    _span_bars(lower, rows)
    return to_svg(figure, "latency")


def draw_trade_off(data: RunData, settings: Sequence[SettingResult]) -> str:
    """Draw action error and success against the bytes of the quantized layers.

    What no setting was judged by has no panel.
    """
    judged = [s for s in settings if s.plan is not None and s.action_error is not None]
    played = [s for s in settings if s.rollouts is not None]
    drawn = [(_errors_by_size, judged), (_success_by_size, played)]
    panels = [(draw, those) for draw, those in drawn if those]
    figure = new_figure(0.6 + 2.2 * len(panels))
    rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (draw, those) in zip(rows, panels, strict=True):
        draw(axes, data, those)
    if len(settings) > _MOST_NAMES:
        legend_above(rows[0], _COLUMNS)
    rows[-1].set_xlabel("bytes of the quantized layers, % of float16 (scales included)")
    rows[-1].set_xlim(left=0)
    return to_svg(figure, "trade-off")


def _errors_by_size(axes: Axes, data: RunData, settings: Sequence[SettingResult]) -> None:
    for i, setting in enumerate(settings):
        assert setting.action_error is not None
        size, error = _size(setting, data), setting.action_error.rms
        axes.plot(size, error, ls="none", ms=7, mec=PAPER, mew=0.6, **_point_look(data, setting))
        # Names of neighbours at alternating heights do not cover each other.
        above = (0, 8 if i % 2 == 0 else -13)
        _name_among_few(axes, data, setting.name, (size, error), above, "center")
    axes.set_ylabel("action error,\nRMS (normalized)")
    axes.margins(x=0.12, y=0.25)
    log_axis(axes, "y")


def _success_by_size(axes: Axes, data: RunData, settings: Sequence[SettingResult]) -> None:
    for setting in settings:
        assert setting.rollouts is not None
        size, share = _size(setting, data), setting.rollouts.success
        bars = [[100 * (share.value - share.low)], [100 * (share.high - share.value)]]
        axes.errorbar(
            size, 100 * share.value, yerr=bars, ls="none", ms=7, mec=PAPER, mew=0.6,
            capsize=2, elinewidth=1.2, **_point_look(data, setting),
        )  # fmt: skip
        _name_among_few(axes, data, setting.name, (size, 100 * share.value), (7, 4), "left")
    axes.set_ylabel("solved episodes, %")


def _size(setting: SettingResult, data: RunData) -> float:
    return 100 * setting.layer_bytes / data.float16_bytes


def _point_look(data: RunData, setting: SettingResult) -> dict[str, Any]:
    look = looks_of(data)[setting.name]
    return {"color": look.color, "marker": look.marker, "label": short(setting.name)}


def _name_among_few(
    axes: Axes,
    data: RunData,
    name: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    align: str,
) -> None:
    """Write a name beside its point, unless there are so many that a legend names them."""
    if len(data.settings) <= _MOST_NAMES:
        name_point(axes, name, at, offset, align, 8)


def _interval_dots(
    axes: Axes, points: Sequence[tuple[float, Share]], data: RunData, name: str
) -> None:
    values = np.array([100 * share.value for _, share in points])
    low = values - np.array([100 * share.low for _, share in points])
    high = np.array([100 * share.high for _, share in points]) - values
    axes.errorbar(
        values,
        [row for row, _ in points],
        # Rounding may put an interval's end a hair inside the value.
        xerr=np.maximum([low, high], 0),
        ls="none",
        color=looks_of(data)[name].color,
        marker=looks_of(data)[name].marker,
        ms=4.5,
        elinewidth=1.1,
        label=short(name),
    )


def _span_bars(axes: Axes, rows: dict[str, Latency]) -> None:
    spans = list(dict.fromkeys(s for r in rows.values() for s in whole_spans(r.samples_ms)))
    left = np.zeros(len(rows))
    for i, span in enumerate(spans):
        medians = np.array(
            [r.percentile(50, span) if span in r.samples_ms else 0.0 for r in rows.values()]
        )
        axes.barh(
            range(len(rows)),
            medians,
            0.62,
            left,
            color=STAGE_COLORS[i % len(STAGE_COLORS)],
            label=span,
        )
        left += medians
    axes.set_yticks(range(len(rows)), [short(name) for name in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("median milliseconds of each span")
    if spans:
        legend_above(axes, 5)


def looks_of(data: RunData) -> dict[str, Look]:
    """Return how each setting, and each profile of no setting, is drawn."""
    float_names = [s.name for s in data.settings if s.plan is None]
    return setting_looks([*(s.name for s in data.settings), *data.other_latencies], float_names)
