"""What several figures draw alike: legends, names of points, ranks, errors over an episode."""

from matplotlib.axes import Axes

from qvla_export.report.svg import INK, MUTED, log_axis, short


def legend_above(axes: Axes, columns: int) -> None:
    """Put the legend above the axes, in one row of columns if they fit."""
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=columns,
        columnspacing=1.2,
        handletextpad=0.4,
        handlelength=1.2,
        borderaxespad=0.2,
    )


def name_point(
    axes: Axes,
    name: str,
    at: tuple[float, float],
    offset: tuple[float, float],
    align: str,
    size: float,
) -> None:
    """Write a name beside a point.

    Args:
        axes: the point's.
        name: shortened where it is long.
        at: the point, in the axes' units.
        offset: of the text from the point, in points.
        align: of the text, horizontally.
        size: of the text, in points.
    """
    axes.annotate(
        short(name), at, offset, textcoords="offset points", ha=align, color=INK, fontsize=size
    )


def draw_diagonal(axes: Axes, count: int) -> None:
    """Draw where two ranks from 1 to `count` are equal, under the points."""
    axes.plot([1, count], [1, count], color=MUTED, lw=0.8, dashes=(4, 2), zorder=1)
    axes.set_aspect("equal")


def label_deviations(axes: Axes, logarithmic: bool) -> None:
    """Label axes of cumulative deviations along episodes (Fig. 3)."""
    axes.set_xlabel("decision of the episode (one action chunk each)")
    axes.set_ylabel("cumulative ‖ΔA‖² (normalized)")
    if logarithmic:
        log_axis(axes, "y")
