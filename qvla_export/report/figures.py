"""Figures of what was decided: sensitivities, their agreement with exact ones, widths."""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from qvla_export.quantizer.layer_names import label_of, module_of
from qvla_export.quantizer.plan import BitPlan
from qvla_export.report.axes import draw_diagonal, legend_above
from qvla_export.report.measured import RankAgreement
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
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.target import WIDTHS

# A 7-billion-parameter policy has 14 modules; beyond this a legend covers its figure.
_CURVES = 8
# Points of a sorted curve: more than the pixels it is drawn on.
_POINTS = 300


def draw_modules(sensitivities: Sensitivities) -> str:
    """Draw a dot for each module's sum over its channels, by width (Fig. 1a of the paper)."""
    modules = sensitivities.module_sums()
    names = sorted(modules, key=lambda name: float(modules[name].max()))
    figure = new_figure(0.95 + 0.3 * len(names))
    axes = figure.subplots()
    for row, name in enumerate(names):
        present = modules[name][modules[name] > 0]
        if len(present):
            axes.plot([present.min(), present.max()], [row, row], color=MUTED, lw=0.7, zorder=1)
    for i, bits in enumerate(sensitivities.widths):
        sums = np.array([modules[name][i] for name in names])
        axes.scatter(
            sums[sums > 0],
            np.flatnonzero(sums > 0),
            s=42,
            color=WIDTH_COLORS[bits],
            marker=MARKERS[i],
            edgecolors=PAPER,
            linewidths=0.5,
            label=_width_name(bits),
            zorder=2,
        )
    axes.set_yticks(range(len(names)), [short(name) for name in names])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.set_xlabel("expected ‖ΔA‖² of a module at one width (normalized action)")
    log_axis(axes, "x")
    legend_above(axes, len(sensitivities.widths))
    return to_svg(figure, "modules")


def draw_channels(sensitivities: Sensitivities) -> str:
    """Draw sorted curves of all channels, by width and at one width by module (Fig. 1b)."""
    figure = new_figure(5.6)
    upper, lower = figure.subplots(2, 1)
    for i, bits in enumerate(sensitivities.widths):
        values = np.concatenate([v[i] for v in sensitivities.values.values()])
        _sorted_curve(upper, values, WIDTH_COLORS[bits], i, _width_name(bits))
    upper.set_title("All channels, by width")
    bits = 4 if 4 in sensitivities.widths else sensitivities.widths[-1]
    modules = _module_channels(sensitivities, bits)
    largest = sorted(modules, key=lambda name: -float(modules[name].sum()))[:_CURVES]
    palette = setting_colors(largest, ())
    for i, name in enumerate(largest):
        _sorted_curve(lower, modules[name], palette[name], i, short(name))
    lower.set_title(f"At {bits} bits, by module")
    for axes in (upper, lower):
        axes.set_xlim(0, 100)
        axes.set_ylabel("expected ‖ΔA‖² of a channel")
        log_axis(axes, "y")
    upper.legend(loc="lower left", ncols=2, handlelength=2.4)
    lower.legend(loc="upper left", bbox_to_anchor=(-0.12, -0.24), ncols=3, handlelength=2.4)
    lower.set_xlabel("share of the channels that are at least this sensitive, %")
    return to_svg(figure, "channels")


def draw_agreement(agreement: RankAgreement) -> str:
    """Draw ranks of estimated against ranks of exact sensitivities (Fig. 7)."""
    figure = new_figure(4.4)
    axes = figure.subplots()
    count = len(agreement.bits)
    ranks_exact, ranks = _ranks(agreement.exact), _ranks(agreement.estimated)
    draw_diagonal(axes, count)
    for i, bits in enumerate(sorted(set(agreement.bits.tolist()))):
        chosen = agreement.bits == bits
        within = agreement.spearman_by_width.get(bits)
        axes.scatter(
            ranks_exact[chosen],
            ranks[chosen],
            s=13,
            alpha=0.85,
            color=WIDTH_COLORS.get(bits, MUTED),
            marker=MARKERS[i],
            linewidths=0,
            label=_width_name(bits) + ("" if within is None else f", ρ {within:.3f}"),
            rasterized=True,
            zorder=2,
        )
    axes.set_xlabel("rank by exact measurement (1 = least sensitive pair)")
    axes.set_ylabel("rank to first order")
    axes.legend(loc="upper left", title=f"all {count} pairs: Spearman ρ {agreement.spearman:.3f}")
    return to_svg(figure, "agreement")


def draw_width_shares(plans: Mapping[str, BitPlan]) -> str:
    """Draw a stacked bar for each plan: how many of all channels have each width."""
    figure = new_figure(0.85 + 0.34 * len(plans))
    axes = figure.subplots()
    counts = [plan.histogram() for plan in plans.values()]
    shares = np.array([[c[bits] for bits in WIDTHS] for c in counts], float)
    shares *= 100 / shares.sum(axis=1, keepdims=True)
    _stacked_rows(axes, shares, height=0.68)
    axes.set_yticks(range(len(plans)), [short(name) for name in plans])
    for row, values in enumerate(shares):
        for left, value in zip(np.cumsum(values) - values, values, strict=True):
            if value >= 8:
                axes.text(left + value / 2, row, f"{value:.0f} %", ha="center", va="center",
                          color="#ffffff", fontweight="bold", fontsize=8)  # fmt: skip
    axes.invert_yaxis()
    axes.set_xlabel("share of all channels, %")
    legend_above(axes, len(WIDTHS))
    return to_svg(figure, "width-shares")


def draw_layer_widths(plan: BitPlan, index: int) -> str:
    """Draw a stacked bar for each layer, in forward order; `index` keeps plans' ids apart."""
    names = list(plan.widths)
    # Small type for the reference policy's 76 layers, thinned labels for hundreds.
    row = 0.118 if len(names) <= 120 else 0.05
    figure = new_figure(0.9 + row * len(names))
    axes = figure.subplots()
    shares = np.array(
        [[100 * float((plan.widths[name] == bits).mean()) for bits in WIDTHS] for name in names]
    )
    _stacked_rows(axes, shares, height=0.92)
    step = 1 if row > 0.1 else 3
    axes.set_yticks(
        range(0, len(names), step), [short(label_of(name)) for name in names[::step]], fontsize=6.5
    )
    axes.tick_params(axis="y", length=0, pad=2)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("share of the layer's channels, %")
    axes.grid(visible=False)
    legend_above(axes, len(WIDTHS))
    return to_svg(figure, f"layer-widths-{index}")


def _stacked_rows(axes: Axes, shares: NDArray[np.float64], height: float) -> None:
    rights = np.cumsum(shares, axis=1)
    rows = np.arange(len(shares))
    for i, bits in enumerate(WIDTHS):
        drawn = shares[:, i] > 0
        # All bars of a width are one path: a hundred layers would make a hundred elements each.
        bars = _rectangles(
            rights[drawn, i] - shares[drawn, i], rights[drawn, i], rows[drawn], height
        )
        axes.add_patch(PathPatch(bars, color=WIDTH_COLORS[bits], lw=0, label=_width_name(bits)))
    axes.set_xlim(0, 100)
    axes.set_ylim(-0.6, len(shares) - 0.4)
    axes.grid(visible=False, axis="y")


def _rectangles(
    left: NDArray[np.float64], right: NDArray[np.float64], rows: NDArray[np.int64], height: float
) -> Path:
    low, high = rows - height / 2, rows + height / 2
    corners = np.stack([left, low, right, low, right, high, left, high, left, low], axis=1)
    codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(left)
    return Path(corners.reshape(-1, 2), codes)


def _module_channels(sensitivities: Sensitivities, bits: int) -> dict[str, NDArray[np.float32]]:
    found: dict[str, list[NDArray[np.float32]]] = {}
    for layer in sensitivities.values:
        found.setdefault(module_of(layer), []).append(sensitivities.at(layer, bits))
    return {name: np.concatenate(parts) for name, parts in found.items()}


def _sorted_curve(
    axes: Axes, values: NDArray[np.float32], color: str, index: int, label: str
) -> None:
    ordered = np.sort(values)[::-1].astype(np.float64)
    rows = np.unique(np.linspace(0, len(ordered) - 1, _POINTS).astype(int))
    # A logarithmic axis has no zero: channels that do not reach the action end the curve.
    heights = np.where(ordered[rows] > 0, ordered[rows], np.nan)
    axes.plot(
        100 * (rows + 1) / len(ordered),
        heights,
        color=color,
        dashes=DASHES[index % len(DASHES)],
        label=label,
    )


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    from scipy.stats import rankdata

    ranks: NDArray[np.float64] = np.asarray(rankdata(values), np.float64)
    return ranks


def _width_name(bits: int) -> str:
    return f"{bits} bits"
