"""The comparison's figures: error over time (Fig. 3), ranks (Fig. 7), error against bytes."""

from collections.abc import Sequence

import numpy as np

from qvla_export.comparison.comparison import FLOAT, Comparison, Ranks
from qvla_export.comparison.contestants import parse_contestant
from qvla_export.comparison.rows import Row
from qvla_export.report.axes import draw_diagonal, label_deviations, name_point
from qvla_export.report.svg import (
    DASHES,
    MARKERS,
    MUTED,
    PAPER,
    WIDTH_COLORS,
    log_axis,
    new_figure,
    setting_colors,
    short,
    to_svg,
)

# A sum below is rounding: the float engine beside the float policy.
_EXACT = 1e-8


def drifting(comparison: Comparison) -> list[Row]:
    """Return the rows whose episodes have deviations to show; no variations if there are others."""
    found = [row for row in comparison.rows if row.cumulative and row.cumulative[-1] > _EXACT]
    return [row for row in found if _is_named(row)] or found


def _is_named(row: Row) -> bool:
    """Whether a row is a main setting or a baseline."""
    contestant = parse_contestant(row.name)
    return "@" not in row.name and (contestant.main or not contestant.ours)


def draw_deviations(comparison: Comparison) -> str:
    """Draw the mean cumulative deviation along episodes (Fig. 3)."""
    figure = new_figure(4.2)
    axes = figure.subplots()
    rows = drifting(comparison)
    colors = setting_colors([row.name for row in rows], ())
    for i, row in enumerate(rows):
        axes.plot(
            range(1, len(row.cumulative) + 1),
            row.cumulative,
            color=colors[row.name],
            dashes=DASHES[i // len(MARKERS) % len(DASHES)],
            label=short(row.name),
        )
    label_deviations(axes, logarithmic=True)
    axes.legend(loc="upper left", bbox_to_anchor=(-0.1, -0.16), ncols=3)
    return to_svg(figure, "deviations")


def draw_ranks(ranks: Ranks) -> str:
    """Draw ranks along episodes against ranks of one decision (Fig. 7)."""
    figure = new_figure(4.4)
    axes = figure.subplots()
    count = len(ranks.channels)
    single = _ranks([sensitivity for _, _, sensitivity, _ in ranks.channels])
    along = _ranks([sensitivity for _, _, _, sensitivity in ranks.channels])
    draw_diagonal(axes, count)
    axes.scatter(
        single,
        along,
        s=10,
        alpha=0.8,
        color=WIDTH_COLORS.get(ranks.bits, MUTED),
        linewidths=0,
        rasterized=True,
        zorder=2,
    )
    axes.set_xlabel("rank by one decision (1 = least sensitive channel)")
    axes.set_ylabel("rank by the sum along episodes")
    axes.set_title(f"{count} channels, {ranks.bits} bits: Spearman ρ {ranks.spearman:.3f}")
    return to_svg(figure, "ranks")


def draw_errors(comparison: Comparison) -> str:
    """Draw the action error of every row against the bytes of its layers."""
    figure = new_figure(4.2)
    axes = figure.subplots()
    rows = [row for row in comparison.rows if row.name != FLOAT and row.rms > 0]
    groups = {
        "planned": [r for r in rows if _group(r) == "planned"],
        "libraries": [r for r in rows if _group(r) == "libraries"],
        "round to nearest": [r for r in rows if _group(r) == "round to nearest"],
    }
    colors = setting_colors(list(groups), ())
    for i, (name, found) in enumerate(groups.items()):
        if not found:
            continue
        axes.plot(
            [100 * row.ratio for row in found],
            [row.rms for row in found],
            ls="none",
            marker=MARKERS[i],
            ms=6,
            mec=PAPER,
            mew=0.5,
            color=colors[name],
            label=name,
        )
    for row in filter(_is_named, rows):
        name_point(axes, row.name, (100 * row.ratio, row.rms), (4, 2), "left", 6)
    axes.set_xlabel("bytes of the quantized layers, % of float16 (scales included)")
    axes.set_ylabel("action error, RMS (normalized)")
    log_axis(axes, "y")
    axes.legend(loc="upper right")
    return to_svg(figure, "errors")


def _group(row: Row) -> str:
    if row.seeds[0].library is not None:
        return "libraries"
    return "round to nearest" if row.name.endswith("-rtn") else "planned"


def _ranks(values: Sequence[float]) -> list[int]:
    order = np.argsort(np.argsort(values, kind="stable"), kind="stable")
    return [int(rank) + 1 for rank in order]
