"""A small self-contained HTML table: how a notebook shows a plan or sensitivities."""

import html
from collections.abc import Mapping, Sequence

# Inline, since a notebook has no style sheet of ours; colours stay the reader's.
_CELL = "padding:2px 10px;text-align:right"
_HEAD = "padding:2px 10px;text-align:left"


def html_table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    provenance: Mapping[str, str],
) -> str:
    """Return a table with a title above and its provenance below; all texts are escaped.

    Args:
        title: one line.
        columns: heads; the first is of the rows' names.
        rows: a name, then as many cells as there are columns beside it.
        provenance: what the numbers were made from, by name.
    """
    heads = "".join(f'<th style="{_HEAD}">{html.escape(name)}</th>' for name in columns)
    body = "".join(_row(cells) for cells in rows)
    facts = "<br>".join(
        f"{html.escape(name)}: <code>{html.escape(value)}</code>"
        for name, value in provenance.items()
    )
    return (
        f"<div><strong>{html.escape(title)}</strong>"
        f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
        f"<small>{facts}</small></div>"
    )


def _row(cells: Sequence[str]) -> str:
    name, *values = (html.escape(cell) for cell in cells)
    shown = "".join(f'<td style="{_CELL}">{value}</td>' for value in values)
    return f'<tr><th style="{_HEAD}">{name}</th>{shown}</tr>'
