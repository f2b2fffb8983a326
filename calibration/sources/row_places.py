"""Where rows are, by what the data says itself and not by what metadata says of files."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.data_paths import visible
from calibration.sources.parquet_rows import open_parquet, read_parquet
from qvla_export.shared.errors import ArtifactError

_INDEX = "index"
_FRAME = "frame_index"


class RowPlaces:
    """Finds rows in the parquet files below a dataset's `data` folder.

    Files are opened when a row is looked for, and their column of numbers is read only where
    the footer's statistics leave it open whether they hold the row.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        # File -> the least and the greatest `index` in it.
        self._ranges: dict[str, tuple[float, float]] | None = None
        # File and column -> its values sorted, and the row of each.
        self._sorted: dict[tuple[str, str], tuple[NDArray[Any], NDArray[np.int64]]] = {}

    def of_indices(self, start: int, stop: int) -> list[tuple[str, int]]:
        """Return files and rows of the global frame numbers [start, stop).

        Raises:
            ArtifactError: no row or several rows have one, or a file is damaged.
        """
        if self._ranges is None:
            self._ranges = self._read_ranges()
        ranges = self._ranges.items()
        files = [name for name, (low, high) in ranges if low < stop and high >= start]
        together = self._run(files[0], _INDEX, start, stop) if len(files) == 1 else None
        return together or [self._of_index(index, files) for index in range(start, stop)]

    def of_frames(self, file: str, start: int, stop: int) -> list[tuple[str, int]]:
        """Return file and rows of frames [start, stop) of the one episode that a file holds.

        Raises:
            ArtifactError: no row or several rows have one, or the file is damaged.
        """
        together = self._run(file, _FRAME, start, stop)
        return together or [self._of_frame(file, frame) for frame in range(start, stop)]

    def _run(self, name: str, column: str, start: int, stop: int) -> list[tuple[str, int]] | None:
        """Return the rows of numbers in one look, where the file has each of them once."""
        values, rows = self._column(name, column)
        numbers = np.arange(start, stop)
        first, last = (np.searchsorted(values, numbers, side) for side in ("left", "right"))
        if not (last - first == 1).all():
            return None
        return [(name, row) for row in rows[first].tolist()]

    def _of_index(self, index: int, files: list[str]) -> tuple[str, int]:
        places = [(name, row) for name in files for row in self._rows(name, _INDEX, index)]
        return self._only(places, f"{self._root / 'data'}", f"index {index}")

    def _of_frame(self, file: str, frame: int) -> tuple[str, int]:
        places = [(file, row) for row in self._rows(file, _FRAME, frame)]
        return self._only(places, f"{self._root / file}", f"frame_index {frame}")

    def _only(self, places: list[tuple[str, int]], folder: str, what: str) -> tuple[str, int]:
        if len(places) > 1:
            files = ", ".join(dict.fromkeys(name for name, _ in places))
            raise ArtifactError(
                f"{folder} has {len(places)} rows of {what}, in {files}; a file may be a copy of "
                "another, or episodes were put together without numbering their rows anew"
            )
        if not places:
            raise ArtifactError(
                f"{folder} has no rows of {what}; the dataset is incomplete or its metadata "
                "belongs to another one"
            )
        return places[0]

    def _read_ranges(self) -> dict[str, tuple[float, float]]:
        paths = visible((self._root / "data").rglob("*.parquet"))
        if not paths:
            expected = self._root / "data/chunk-000/file-000.parquet"
            raise ArtifactError(f"a file of the dataset is missing: {expected}")
        ranges = {}
        for path in paths:
            name = path.relative_to(self._root).as_posix()
            ranges[name] = _range_in_footer(path) or self._range_of_values(name)
        return ranges

    def _range_of_values(self, name: str) -> tuple[float, float]:
        values, _ = self._column(name, _INDEX)
        present = values[~np.isnan(values)]
        return (float(present[0]), float(present[-1])) if len(present) else (0, -1)

    def _rows(self, name: str, column: str, value: int) -> list[int]:
        values, rows = self._column(name, column)
        first, last = (np.searchsorted(values, value, side) for side in ("left", "right"))
        return [int(row) for row in rows[first:last]]

    def _column(self, name: str, column: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if (name, column) not in self._sorted:
            path = self._root / name
            values = read_parquet(path, [column])[column].to_numpy()
            if values.dtype.kind not in "iuf":
                raise ArtifactError(f"{path}: column {column} holds no numbers")
            order = np.argsort(values, kind="stable").astype(np.int64)
            self._sorted[name, column] = (values[order], order)
        return self._sorted[name, column]


def _range_in_footer(path: Path) -> tuple[float, float] | None:
    """Return the least and greatest `index` a footer states; None where it does not."""
    with open_parquet(path) as file:
        metadata = file.metadata
        names = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        if _INDEX not in names:
            return None
        column = names.index(_INDEX)
        groups = range(metadata.num_row_groups)
        stats = [metadata.row_group(i).column(column).statistics for i in groups]
    if not stats or any(s is None or not s.has_min_max for s in stats):
        return None
    low, high = min(s.min for s in stats), max(s.max for s in stats)
    return (low, high) if isinstance(low, int | float) else None
