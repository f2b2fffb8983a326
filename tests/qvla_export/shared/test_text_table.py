"""Tables of texts: every row has a cell for each column."""

import pytest

from qvla_export.shared.errors import QvlaError
from qvla_export.shared.tables.text_table import TextTable, megabytes


def test_a_row_has_a_cell_for_each_column() -> None:
    table = TextTable(("name", "MB")).with_rows([("w4", "1.5"), ("w8", "3.0")])
    assert table.rows == (("w4", "1.5"), ("w8", "3.0"))
    with pytest.raises(QvlaError, match=r"'name', 'MB'.* needs 2 cells, got \['w4'\]"):
        TextTable(("name", "MB")).with_rows([("w4",)])


def test_bytes_that_are_not_known_leave_a_cell_empty() -> None:
    assert (megabytes(1_234_567), megabytes(None)) == ("1.235", "")
