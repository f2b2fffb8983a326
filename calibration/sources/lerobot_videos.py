"""In which video file, and where in it, the pictures of a LeRobotDataset's episodes are."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.sources.lerobot_paths import V2_VIDEO, V3_VIDEO, PathTemplate
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import whole_number

_NUMBERS = ("chunk_index", "file_index")
_TIMES = ("from_timestamp", "to_timestamp")


@dataclass(frozen=True)
class VideoSpan:
    """Where an episode's pictures are in a video file."""

    # Relative to the dataset's root.
    file: str
    # Seconds in the file at which the episode begins and ends; None where the file ends with it.
    start: float = 0.0
    stop: float | None = None

    def seconds_at(self, timestamp: object, last: float, half_frame: float, place: str) -> float:
        """Return the seconds in the file of a row's picture.

        Args:
            timestamp: what the row says, in seconds from the episode's start.
            last: the timestamp of the episode's last row.
            half_frame: half the time between two rows, in seconds.
            place: names the row in an error.

        Raises:
            ArtifactError: the timestamp is no number, or the video ends before the rows do.
        """
        if not isinstance(timestamp, int | float) or not math.isfinite(timestamp):
            raise ArtifactError(
                f"{place}: pictures of videos are found by their row's timestamp, which is "
                f"{timestamp!r}; write the dataset's timestamps anew"
            )
        seconds = self.start + timestamp
        ends = math.inf if self.stop is None else self.stop
        if seconds < self.start - half_frame or max(seconds, self.start + last) > ends - half_frame:
            raise ArtifactError(
                f"{place}: meta/episodes has the episode at {self.start:.6f} to {ends:.6f} s of "
                f"{self.file}, but its rows go to {self.start + last:.6f} s and this one is at "
                f"{seconds:.6f} s: the video is shorter than its rows, or of others; copy or "
                "download the dataset anew"
            )
        return seconds


class VideoPlaces:
    """Finds the videos of a dataset's columns; none are opened.

    Raises:
        ArtifactError: info.json's `video_path` is no path below the dataset.
    """

    def __init__(self, root: Path, info: Mapping[str, Any], columns: Sequence[str]) -> None:
        self._columns = columns
        self._info = root / "meta/info.json"
        third = str(info["codebase_version"]).removeprefix("v").startswith("3")
        usual = V3_VIDEO if third else V2_VIDEO
        read = info if columns else {}
        self._template = PathTemplate.of(self._info, read, "video_path", usual)
        self._template.require_below(columns, self._info)

    @property
    def table_columns(self) -> tuple[str, ...]:
        """Columns of the v3.0 tables of episodes that say where videos are."""
        return tuple(name for column in self._columns for name in _names(column))

    def require_columns(self, path: Path, present: Sequence[str]) -> None:
        """Refuse a v3.0 table of episodes that does not say where videos are.

        Raises:
            ArtifactError: naming the column.
        """
        for column in self._columns:
            if missing := [n for n in _names(column) if n not in present]:
                raise ArtifactError(
                    f"{self._info} says that {column} is video, but {path} lacks {missing}, which "
                    "say where it is; copy or download the dataset anew, or write dtype image if "
                    "its rows have the pictures"
                )

    def of_row(self, row: Mapping[str, Any], place: str) -> dict[str, VideoSpan]:
        """Return where the videos are of an episode in a v3.0 table, by column.

        Raises:
            ArtifactError: a number is missing, or the episode ends before it begins.
        """
        return {column: self._of_row(row, column, place) for column in self._columns}

    def of_episode(self, episode: int, chunk: int) -> dict[str, VideoSpan]:
        """Return the videos of an episode of v2, which has files of its own, by column."""
        numbers = {"episode_index": episode, "episode_chunk": chunk}
        return {column: VideoSpan(self._file(column, numbers)) for column in self._columns}

    def _of_row(self, row: Mapping[str, Any], column: str, place: str) -> VideoSpan:
        numbers = {}
        for name in _NUMBERS:
            key = f"videos/{column}/{name}"
            numbers[name] = whole_number(row[key], f"{place}, column {key}")
        start, stop = (row[f"videos/{column}/{name}"] for name in _TIMES)
        times = [t for t in (start, stop) if isinstance(t, int | float) and math.isfinite(t)]
        if len(times) < len(_TIMES) or not 0 <= start < stop:
            raise ArtifactError(
                f"{place}, column videos/{column}: an episode's video is from a time to a later "
                f"one, got {start!r} to {stop!r}; write the dataset's metadata anew"
            )
        return VideoSpan(self._file(column, numbers), float(start), float(stop))

    def _file(self, column: str, numbers: Mapping[str, int]) -> str:
        return self._template.file(video_key=column, **numbers)


def _names(column: str) -> list[str]:
    return [f"videos/{column}/{name}" for name in _NUMBERS + _TIMES]
