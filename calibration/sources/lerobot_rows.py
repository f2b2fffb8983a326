"""The rows of a LeRobotDataset's episodes, wherever they are."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calibration.sources.lerobot_metadata import EpisodeSpan
from calibration.sources.parquet_rows import ParquetRows
from calibration.sources.row_places import RowPlaces
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import whole_number

_EPISODE = "episode_index"
_REMEDIES = {
    "task_index": "say what is done with --instruction TEXT, or with --instruction-column COLUMN "
    "where a column has it"
}


class EpisodeRows:
    """Reads some columns of episodes' rows; the last row group stays in memory."""

    def __init__(self, root: Path, columns: Sequence[str]) -> None:
        self._root = root
        self._rows = ParquetRows(root, list(dict.fromkeys([*columns, _EPISODE])), _REMEDIES)
        self._places = RowPlaces(root)

    def read(self, span: EpisodeSpan, start: int, stop: int) -> Any:
        """Return the rows of frames [start, stop) of an episode as a pyarrow table.

        Raises:
            ArtifactError: a file is missing or damaged, or a row is missing or of another episode.
        """
        if span.file is None:
            places = self._places.of_indices(span.start + start, span.start + stop)
        else:
            places = self._places.of_frames(span.file, start, stop)
        table = self._rows.read_places(places)
        for row, value in enumerate(table[_EPISODE].to_pylist()):
            place = span.place(self._root, start + row, _EPISODE)
            if whole_number(value, place) != span.index:
                raise ArtifactError(
                    f"{place}: the row is of episode {value}; meta/episodes and data do not "
                    "belong together"
                )
        return table

    def close(self) -> None:
        """Close the open file; reading again reopens it."""
        self._rows.close()
