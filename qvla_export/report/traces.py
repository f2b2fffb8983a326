"""Figure of action traces: demonstrated, float and quantized, one row a number of the action."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from qvla_export.report.recommendation import DEMONSTRATED, FLOAT_POLICY, Traces
from qvla_export.report.svg import FLOAT_COLOR, INK, MUTED, Look, new_figure, short, to_svg

# Quantized settings in one figure; more lie upon each other.
_SETTINGS = 3
_ROW = 0.72  # inches


def draw_traces(traces: Traces, settings: Sequence[str], looks: Mapping[str, Look]) -> str:
    """Draw the chunks of a few held-out observations side by side.

    Args:
        traces: see `Traces`.
        settings: quantized ones, the most important first.
        looks: of settings.
    """
    figure = new_figure(0.9 + _ROW * len(traces.labels))
    rows = figure.subplots(len(traces.labels), 1, sharex=True, squeeze=False)[:, 0]
    shown = [name for name in settings if name in traces.actions][:_SETTINGS]
    for dim, (axes, label) in enumerate(zip(rows, traces.labels, strict=True)):
        if DEMONSTRATED in traces.actions:
            _curve(axes, traces.actions[DEMONSTRATED][..., dim], DEMONSTRATED, color=INK, lw=2.6,
                   alpha=0.35)  # fmt: skip
        _curve(axes, traces.actions[FLOAT_POLICY][..., dim], FLOAT_POLICY, color=FLOAT_COLOR,
               lw=1.4)  # fmt: skip
        for name in shown:
            look = looks[name]
            _curve(axes, traces.actions[name][..., dim], short(name), color=look.color, lw=1.2,
                   dashes=look.dashes or (1, 1), marker=look.marker, ms=2.5)  # fmt: skip
        axes.set_ylabel(label, rotation=0, ha="right", va="center")
        axes.tick_params(axis="y", labelsize=6.5)
        _separate(axes, *traces.actions[FLOAT_POLICY].shape[:2])
    rows[-1].set_xlabel("step of the chunk; one chunk for each held-out observation")
    rows[0].legend(
        loc="lower left", bbox_to_anchor=(-0.2, 1), ncols=5, columnspacing=1.0, handlelength=1.6
    )
    return to_svg(figure, "traces")


def _curve(axes: Axes, chunks: NDArray[np.float64], name: str, **look: object) -> None:
    """Draw chunks one behind the other, with a gap between them."""
    count, horizon = chunks.shape
    gap = np.full((count, 1), np.nan)
    x = np.arange(count * (horizon + 1), dtype=float)
    axes.plot(x, np.concatenate([chunks, gap], axis=1).reshape(-1), label=name, **look)  # type: ignore[arg-type]  # looks are matplotlib's own


def _separate(axes: Axes, count: int, horizon: int) -> None:
    starts = np.arange(count) * (horizon + 1)
    for start in starts[1:]:
        axes.axvline(start - 1, color=MUTED, lw=0.5)
    ends = sorted({0, horizon - 1})
    ticks = [start + end for start in starts for end in ends]
    axes.set_xticks(ticks, [str(1 + end) for _ in starts for end in ends])
    axes.grid(visible=False, axis="x")
