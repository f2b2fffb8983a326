"""Matplotlib figures -> inline SVG that follows the page's light or dark colours.

Text and lines are drawn in stand-in colours that become CSS variables; text stays text.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

# Stand-ins for the page's colours.
INK, MUTED, GRID, PAPER = "#0a0b0c", "#1a1b1c", "#2a2b2c", "#3a3b3c"
_VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", PAPER: "--paper"}
# Okabe and Ito's hues, where needed darkened, so that each shows on white and on black.
_SERIES = ("#1f78b8", "#d55e00", "#0a9a73", "#c46a9c", "#b58900", "#6f6fd6", "#a0522d", "#4d9aa8")
# The spans of an action; other hues than the first settings have.
STAGE_COLORS = ("#c46a9c", "#b58900", "#8a97a3", "#6f6fd6", "#a0522d")
FLOAT_COLOR = "#7d7d7d"
# Colours, markers and dashes repeat after 8, 12 and 5, so that the first 40 settings differ in
# colour or dash, and the first 24 in colour or marker.
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
DASHES: tuple[tuple[float, ...], ...] = (
    (),
    (5, 1.5),
    (2, 1.2),
    (6, 1.5, 1.5, 1.5),
    (8, 1.5, 1.5, 1.5, 1.5, 1.5),
)
# Ordered by lightness, so that widths can be told apart without seeing hue.
WIDTH_COLORS = {0: "#b9b9b4", 2: "#dcb63c", 4: "#4ba589", 8: "#3079ad", 16: "#5a3f94"}
# Inches; on a phone one figure spans the screen at about its natural size.
WIDTH = 5.2
_LONGEST_NAME = 24
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qvla",
    # Names come from others: a dollar sign is no formula.
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.dpi": 160,
}
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def setting_colors(names: Sequence[str], float_names: Sequence[str]) -> dict[str, str]:
    """Return each setting's colour: grey for float, the others' in their order."""
    quantized = [name for name in names if name not in float_names]
    colors = {name: _SERIES[i % len(_SERIES)] for i, name in enumerate(quantized)}
    return {name: colors.get(name, FLOAT_COLOR) for name in names}


@dataclass(frozen=True)
class Look:
    """How a setting is drawn, in every figure alike."""

    color: str
    marker: str
    # Lengths of dashes and gaps, in line widths; empty for a solid line.
    dashes: tuple[float, ...]


def setting_looks(names: Sequence[str], float_names: Sequence[str]) -> dict[str, Look]:
    """Return each setting's look: float grey, solid and round, the others' in their order."""
    colors = setting_colors(names, float_names)
    looks = {name: Look(FLOAT_COLOR, MARKERS[0], DASHES[0]) for name in float_names}
    for i, name in enumerate(name for name in names if name not in float_names):
        # Float has the first of each.
        marker, dashes = MARKERS[(i + 1) % len(MARKERS)], DASHES[(i + 1) % len(DASHES)]
        looks[name] = Look(colors[name], marker, dashes)
    return looks


@contextmanager
def style() -> Iterator[None]:
    """Draw the block's figures in the page's style, whatever the user's own settings are."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        yield


def new_figure(height: float) -> Figure:
    """Return an empty figure as wide as a phone, `height` inches high."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def to_svg(figure: Figure, name: str) -> str:
    """Return inline SVG without size; the same figure gives the same text.

    Args:
        figure: drawn in `style`.
        name: keeps the ids of several figures on a page apart; letters and hyphens.
    """
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The reader's browser has other fonts than the one measured with here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, count=1, flags=re.S)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.S)
    # Ids are matplotlib's own; text that looks like one lies between tags, never inside.
    text = re.sub(r'(<[^>]*?\sid=")', rf"\g<1>{name}-", text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    head, body = text.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    for stand_in, variable in _VARIABLES.items():
        body = body.replace(stand_in, f"var({variable})")
    return re.sub(r"\n\s*", "\n", f'{head} aria-hidden="true" focusable="false">{body}').strip()


def short(name: str) -> str:
    """Return a name that fits beside an axis; the page's tables have it whole."""
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def log_axis(axes: Axes, which: str) -> None:
    """Make an axis logarithmic with labels such as 10⁻³."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    if high / low > 50:
        axis.set_major_locator(LogLocator(10, numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(_power))
    else:
        axis.set_major_locator(LogLocator(10, subs=(1, 2, 5), numticks=9))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _power(value: float, _: object) -> str:
    exponent = f"{value:e}".split("e")[1]
    return "10" + str(int(exponent)).translate(_SUPERSCRIPTS)
