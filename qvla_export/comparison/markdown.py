"""A comparison as markdown: for a README."""

from collections.abc import Iterator

from qvla_export.comparison.bars import bars
from qvla_export.comparison.comparison import Comparison
from qvla_export.comparison.contestants import TABLES
from qvla_export.comparison.tables import paper_table
from qvla_export.report.tables import Cell, Table


def to_markdown(comparison: Comparison) -> str:
    """Return every table that has rows, the bars, the command and the versions."""
    return "\n".join(_lines(comparison)) + "\n"


def _lines(comparison: Comparison) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in comparison.made_with.items())
    machine = ", ".join(f"{name} {value}" for name, value in comparison.machine.items())
    yield f"`{comparison.command}` ({machine}; {versions})"
    yield ""
    for bar in bars(comparison):
        yield f"- {bar.asked}: **{bar.verdict}** ({bar.found})"
    ranks = comparison.ranks
    if ranks is not None:
        yield (
            f"- Fig. 7: {len(ranks.channels)} channels at {ranks.bits} bits, one decision against "
            f"along episodes: Spearman {ranks.spearman:.3f}, {ranks.near_diagonal:.0%} within a "
            "tenth of the ranks of the diagonal"
        )
    for table in TABLES:
        content = paper_table(comparison, table)
        if len(content.rows) > 1:
            yield ""
            yield f"Table {table.number}: {table.title}. {table.note}"
            yield ""
            yield from _table(content)


def _table(content: Table) -> Iterator[str]:
    yield f"| {' | '.join(content.columns)} |"
    yield "|---" * len(content.columns) + "|"
    for row in content.rows:
        yield f"| {' | '.join(map(_cell, row))} |"


def _cell(cell: Cell) -> str:
    text = f"{cell.text} ({cell.note})" if cell.note else cell.text
    return text.replace("|", "\\|").replace("\n", " ")
