"""Rows of parquet files by number, one row group in memory at a time."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.git_lfs import refuse_pointer

# What pyarrow raises for damaged bytes; names that are no UTF-8 come as a bare decoding error.
_DAMAGED = (pa.ArrowException, OSError, UnicodeDecodeError)
# Bounds of what a footer announces, which is allocated before data shows whether it is true.
_MOST_FOOTER_BYTES = 256 << 20
_MOST_ROWS = 200_000_000
_MOST_GROUP_BYTES = 8 << 30
# Of a table that is read whole: episodes, tasks, one column of numbers.
_MOST_TABLE_BYTES = 4 << 30


class ParquetRows:
    """Reads runs of rows from a folder's parquet files; the last row group is kept."""

    def __init__(
        self, root: Path, columns: Sequence[str], remedies: Mapping[str, str] | None = None
    ) -> None:
        """Read some columns.

        Args:
            root: folder of the files.
            columns: their names.
            remedies: what to do where one of them is missing.
        """
        self._root = root
        self._remedies = remedies or {}
        self._columns = list(columns)
        self._name: str | None = None
        self._file: Any = None
        self._starts = np.zeros(0, dtype=np.int64)
        self._group: int | None = None
        self._table: Any = None

    def read(self, name: str, start: int, stop: int) -> Any:
        """Return rows [start, stop) of one file as a pyarrow table.

        Raises:
            ArtifactError: the file is missing, damaged, lacks a column or has too few rows.
        """
        self._open(name)
        if not 0 <= start < stop <= self._starts[-1]:
            raise ArtifactError(
                f"{self._root / name} has {self._starts[-1]} rows, not {start}..{stop}; "
                "the dataset is incomplete or its metadata belongs to another one"
            )
        parts = []
        while start < stop:
            group = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = min(stop, int(self._starts[group + 1]))
            first = int(self._starts[group])
            parts.append(self._read_group(group).slice(start - first, end - start))
            start = end
        return self._joined(parts)

    def read_places(self, places: Sequence[tuple[str, int]]) -> Any:
        """Return the rows at files and row numbers, in their order, as a pyarrow table.

        Raises:
            ArtifactError: a file is missing, damaged, lacks a column or has too few rows.
        """
        parts = []
        first = 0
        for i, (name, row) in enumerate(places):
            if i + 1 == len(places) or places[i + 1] != (name, row + 1):
                parts.append(self.read(name, places[first][1], row + 1))
                first = i + 1
        return self._joined(parts)

    def close(self) -> None:
        """Close the open file; reading again reopens it."""
        if self._file is not None:
            self._file.close()
        self._name = self._file = self._group = self._table = None

    def _joined(self, parts: Sequence[Any]) -> Any:
        """Return tables one below the other; files may differ in how wide their numbers are."""
        if len(parts) == 1:
            return parts[0]
        try:
            return pa.concat_tables(parts, promote_options="permissive")
        except pa.ArrowException as error:
            reason = " ".join(str(error).split())[:200]
            raise ArtifactError(
                f"{self._root}: columns of one episode have other types in one file than in "
                f"another ({reason}); write the dataset's files anew, all alike"
            ) from None

    def _open(self, name: str) -> None:
        if name == self._name:
            return
        self.close()
        path = self._root / name
        self._file = open_parquet(path)
        try:
            _require_columns(path, self._file.schema_arrow.names, self._columns, self._remedies)
        except ArtifactError:
            self.close()
            raise
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
        self._name = name

    def _read_group(self, group: int) -> Any:
        if group != self._group:
            size = self._file.metadata.row_group(group).total_byte_size
            _require_at_most(_MOST_GROUP_BYTES, size, self._root / str(self._name), "a row group")
            try:
                self._table = self._file.read_row_group(group, columns=self._columns)
                # Texts that are no UTF-8 would be found where they are used.
                self._table.validate(full=True)
            except _DAMAGED as error:
                self._group = None
                raise _damage_error(self._root / str(self._name), error) from None
            self._group = group
        return self._table


def open_parquet(path: Path) -> Any:
    """Open a parquet file.

    Raises:
        ArtifactError: it is missing, truncated or no parquet file.
    """
    try:
        file = pq.ParquetFile(
            path,
            page_checksum_verification=True,
            thrift_string_size_limit=_MOST_FOOTER_BYTES,
            thrift_container_size_limit=_MOST_FOOTER_BYTES // 8,
        )
    except FileNotFoundError:
        raise ArtifactError(f"a file of the dataset is missing: {path}") from None
    except _DAMAGED as error:
        refuse_pointer(path)
        raise _damage_error(path, error) from None
    if not 0 <= file.metadata.num_rows <= _MOST_ROWS:
        file.close()
        raise _damage_error(path, ValueError(f"{file.metadata.num_rows} rows are announced"))
    return file


def column_names(path: Path) -> list[str]:
    """Return the names of a parquet file's columns.

    Raises:
        ArtifactError: it is missing, truncated or no parquet file.
    """
    with open_parquet(path) as file:
        try:
            return list(file.schema_arrow.names)
        except _DAMAGED as error:
            raise _damage_error(path, error) from None


def read_parquet(path: Path, columns: Sequence[str] | None = None) -> Any:
    """Return a small parquet file as a pyarrow table; all columns by default.

    Raises:
        ArtifactError: it is missing, damaged or lacks a column.
    """
    with open_parquet(path) as file:
        try:
            _require_columns(path, file.schema_arrow.names, columns or (), {})
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(i).total_byte_size for i in groups)
            if columns is None:
                _require_at_most(_MOST_TABLE_BYTES, size, path, "a table of metadata")
            table = file.read(columns=None if columns is None else list(columns))
            table.validate(full=True)
            return table
        except _DAMAGED as error:
            raise _damage_error(path, error) from None


def _require_columns(
    path: Path, present: Sequence[str], columns: Sequence[str], remedies: Mapping[str, str]
) -> None:
    if missing := [key for key in columns if key not in present]:
        told = "".join(f"; {remedies[key]}" for key in missing if key in remedies)
        raise ArtifactError(
            f"{path} lacks the columns {missing}; it has {', '.join(present)}{told}"
        )
    if twice := [key for key in columns if present.count(key) > 1]:
        raise ArtifactError(
            f"{path} has several columns named {twice[0]}; write the dataset with one of each name"
        )


def _require_at_most(most: int, size: int, path: Path, what: str) -> None:
    if not 0 <= size <= most:
        raise ArtifactError(
            f"{path}: {what} of {size:,} bytes is announced, at most {most:,} are read; write the "
            "dataset with smaller row groups"
        )


def _damage_error(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path} is truncated or damaged ({error}); copy the dataset again")
