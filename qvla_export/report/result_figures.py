"""Figures of what came out: error over time, success, latency, the trade-off."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from qvla_export.report.axes import label_deviations, legend_above, name_point
from qvla_export.report.measured import Latency, Share
from qvla_export.report.run_data import RunData, SettingResult
from qvla_export.report.svg import (
    DASHES,
    MARKERS,
    MUTED,
    PAPER,
    STAGE_COLORS,
    log_axis,
    new_figure,
    setting_colors,
    short,
    to_svg,
)
from qvla_export.shared.clock import whole_spans

_NORMAL_95 = 1.96
_EXACT = 1e-8  # a sum below is rounding: the float engine beside the float policy


def draw_deviation(data: RunData, settings: Sequence[SettingResult]) -> str:
    """Draw the mean cumulative deviation along episodes with a 95 % band (Fig. 3)."""
    figure = new_figure(3.3)
    axes = figure.subplots()
    colors = _colors(data)
    drifting = [s for s in settings if s.rollouts and s.rollouts.cumulative[:, -1].mean() > _EXACT]
    for setting in drifting or settings:
        assert setting.rollouts is not None
        sums = setting.rollouts.cumulative
        decisions = np.arange(1, sums.shape[1] + 1)
        mean = sums.mean(axis=0)
        spread = np.zeros_like(mean)
        if len(sums) > 1:
            spread = _NORMAL_95 * sums.std(axis=0, ddof=1) / np.sqrt(len(sums))
        color = colors[setting.name]
        # A logarithmic axis cannot show a band that reaches zero.
        low = np.maximum(mean - spread, mean / 10)
        axes.fill_between(decisions, low, mean + spread, color=color, alpha=0.2, linewidth=0)
        axes.plot(
            decisions,
            mean,
            color=color,
            dashes=_dashes(data, setting.name),
            label=short(setting.name),
        )
    label_deviations(axes, logarithmic=bool(drifting))
    axes.legend(loc="lower right")
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
    colors = _colors(data, tuple(data.other_latencies))
    for name, latency in rows.items():
        total = np.sort(latency.samples_ms["total"])
        share = 100 * np.arange(1, len(total) + 1) / len(total)
        upper.step(
            total, share, where="post", color=colors[name], dashes=_dashes(data, name), label=name
        )
    upper.set_ylim(0, 101)
    upper.set_ylabel("actions at most this slow, %")
    upper.set_xlabel("milliseconds from request to action")
    upper.legend(loc="lower right")
    _span_bars(lower, rows)
    return to_svg(figure, "latency")


def draw_trade_off(data: RunData, settings: Sequence[SettingResult]) -> str:
    """Draw action error and success against the bytes of the quantized layers."""
    figure = new_figure(5.0)
    upper, lower = figure.subplots(2, 1, sharex=True)
    colors = _colors(data)
    for i, setting in enumerate(settings):
        size = 100 * setting.layer_bytes / data.float16_bytes
        look = {"color": colors[setting.name], "marker": _marker(data, setting.name)}
        # Names of neighbours at alternating heights do not cover each other.
        above = (0, 8 if i % 2 == 0 else -13)
        if setting.plan is not None and setting.action_error is not None:
            error = setting.action_error.rms
            upper.plot(size, error, ls="none", ms=7, mec=PAPER, mew=0.6, **look)
            name_point(upper, setting.name, (size, error), above, "center", 8)
        if setting.rollouts is not None:
            share = setting.rollouts.success
            bars = [[100 * (share.value - share.low)], [100 * (share.high - share.value)]]
            lower.errorbar(
                size, 100 * share.value, yerr=bars, ls="none", ms=7, mec=PAPER, mew=0.6,
                capsize=2, elinewidth=1.2, **look,
            )  # fmt: skip
            name_point(lower, setting.name, (size, 100 * share.value), (7, 4), "left", 8)
    upper.set_ylabel("action error,\nRMS (normalized)")
    if any(s.plan is not None and s.action_error is not None for s in settings):
        upper.margins(x=0.12, y=0.25)
        log_axis(upper, "y")
    lower.set_ylabel("solved episodes, %")
    lower.set_xlabel("bytes of the quantized layers, % of float16 (scales included)")
    lower.set_xlim(left=0)
    return to_svg(figure, "trade-off")


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
        color=_colors(data)[name],
        marker=_marker(data, name),
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


def _colors(data: RunData, more: tuple[str, ...] = ()) -> dict[str, str]:
    float_names = [s.name for s in data.settings if s.plan is None]
    return setting_colors([*(s.name for s in data.settings), *more], float_names)


def _place(data: RunData, name: str) -> int:
    names = [*(s.name for s in data.settings), *data.other_latencies]
    return names.index(name)


def _marker(data: RunData, name: str) -> str:
    return MARKERS[_place(data, name) % len(MARKERS)]


def _dashes(data: RunData, name: str) -> tuple[float, ...]:
    return DASHES[_place(data, name) % len(DASHES)]
