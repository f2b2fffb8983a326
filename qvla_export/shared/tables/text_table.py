"""The noun `TextTable`: figures of a result for a reader at a terminal; who prints it draws it."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qvla_export.shared.errors import QvlaError


@dataclass(frozen=True)
class TextTable:
    """Columns with a cell each in every row, all of them texts.

    Raises:
        QvlaError: a row has more or fewer cells than there are columns.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...] = ()
    # Empty for none.
    title: str = ""
    # Columns of words, aligned left like the first; all others are figures.
    words: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise QvlaError(
                    f"a row of a table of {list(self.columns)} needs {len(self.columns)} cells, "
                    f"got {list(row)}"
                )

    def with_rows(self, rows: Iterable[tuple[str, ...]]) -> "TextTable":
        """Return the table with these rows instead of its own."""
        return replace(self, rows=tuple(rows))


def megabytes(nbytes: int | None) -> str:
    """Return bytes in 10^6 of them for a cell; empty where they are not known."""
    return "" if nbytes is None else f"{nbytes / 1e6:.3f}"
