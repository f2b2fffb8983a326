"""What tables of a page are made of."""

from dataclasses import dataclass

# Where there is no value.
NONE = "–"


@dataclass(frozen=True)
class Cell:
    """A number and, smaller below it, what qualifies it."""

    text: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows below a heading; the first cell of a row names it."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
