"""A comparison -> one page without any outside resource."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from qvla_export.comparison import drawings
from qvla_export.comparison.comparison import Comparison
from qvla_export.comparison.contestants import TABLES
from qvla_export.comparison.tables import all_rows, bar_table, dimensions, paper_table
from qvla_export.report import figures
from qvla_export.report.cells import Table
from qvla_export.report.page import Drawing
from qvla_export.report.svg import style
from qvla_export.sensitivity.sensitivities import Sensitivities


@dataclass(frozen=True)
class NumberedTable:
    """One table of the page."""

    number: str
    title: str
    note: str
    content: Table


def render(comparison: Comparison, sensitivities: Sensitivities) -> str:
    """Return the page.

    Args:
        comparison: what was measured.
        sensitivities: of the first seed, for Fig. 1.
    """
    environment = Environment(
        loader=ChoiceLoader(
            [PackageLoader("qvla_export.comparison", ""), PackageLoader("qvla_export.report", "")]
        ),
        autoescape=select_autoescape(default=True, default_for_string=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    tables = [NumberedTable(t.number, t.title, t.note, paper_table(comparison, t)) for t in TABLES]
    with style():
        drawn = list(_drawings(comparison, sensitivities))
    return environment.get_template("comparison.html.j2").render(
        data=comparison,
        bars=bar_table(comparison),
        tables=tables,
        everything=all_rows(comparison),
        dimensions=dimensions(comparison),
        drawings=drawn,
    )


def _drawings(comparison: Comparison, sensitivities: Sensitivities) -> Iterator[Drawing]:
    yield _drawing(
        "Fig. 1a: sensitivity of modules",
        "Expected squared deviation of the normalized action chunk if all channels of one module "
        f"had one width ({sensitivities.method}, {sensitivities.samples} observations).",
        "Dot plot; one row a module, one dot a width.",
        lambda: figures.draw_modules(sensitivities),
    )
    yield _drawing(
        "Fig. 1b: sensitivity of channels",
        "Every channel's sensitivity, most sensitive first.",
        "Falling curves over the share of channels.",
        lambda: figures.draw_channels(sensitivities),
    )
    if drawings.drifting(comparison):
        yield _drawing(
            "Fig. 3: error over time",
            "Running sum of the squared deviation from the float policy on the same observations "
            "along closed-loop episodes, mean. An episode that has ended keeps its sum. Variations "
            "are in the tables only.",
            "Rising curves over decisions, one a setting; the ends are in the tables.",
            lambda: drawings.draw_deviations(comparison),
        )
    ranks = comparison.ranks
    if ranks is not None:
        yield _drawing(
            "Fig. 7: one decision and whole episodes",
            f"Sensitivities on {ranks.observations[0]} single observations and summed along "
            f"episodes on {ranks.observations[1]}, of other episodes; "
            f"{ranks.near_diagonal:.0%} of the channels lie within a tenth of the ranks of the "
            "diagonal.",
            f"Scatter along the diagonal; Spearman rank correlation {ranks.spearman:.3f}.",
            lambda: drawings.draw_ranks(ranks),
        )
    if any(row.rms > 0 for row in comparison.rows):
        yield _drawing(
            "Error against bytes",
            "All settings and baselines; variations have no names here, values are in the tables.",
            "Scatter of action error over size, planned settings, libraries, round to nearest.",
            lambda: drawings.draw_errors(comparison),
        )


def _drawing(title: str, caption: str, alt: str, draw: Callable[[], str]) -> Drawing:
    # The only markup that is not escaped: made by matplotlib, which escapes the names in it.
    return Drawing("figures", title, caption, alt, Markup(draw()))
