"""Pictures of a LeRobotDataset's cameras: in its rows, or in videos beside them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.sources.data_paths import path_inside
from calibration.sources.image_codec import decode_png, encode_png, require_picture
from calibration.sources.lerobot_columns import is_video, picture_size
from calibration.sources.lerobot_metadata import EpisodeSpan
from calibration.sources.lerobot_values import picture_bytes
from calibration.sources.video_pictures import VideoPicture, VideoPictures
from qvla_export.shared.errors import ArtifactError


@dataclass(frozen=True)
class RowOfEpisode:
    """A row of a table, and which frame of which episode it is."""

    table: Any
    row: int
    span: EpisodeSpan
    frame: int

    def alone(self) -> "RowOfEpisode":
        """Return a copy that keeps none of the table's other rows in memory."""
        return RowOfEpisode(self.table.take([self.row]), 0, self.span, self.frame)


class Cameras:
    """Reads the pictures that rows have or point to, each camera's of one size."""

    def __init__(
        self, root: Path, fps: float, columns: Mapping[str, str], features: Mapping[str, Any]
    ) -> None:
        self._root = root
        self._fps = fps
        # Camera -> column; and columns of videos.
        self._columns = columns
        self.videos = tuple(c for c in columns.values() if is_video(features[c]))
        self._pictures = VideoPictures(fps)
        # Camera -> size of its pictures, and where that is from: info.json, or the first picture.
        self._sizes: dict[str, tuple[tuple[int, ...], str]] = {}
        for name, column in columns.items():
            if column in self.videos and (size := picture_size(features[column])):
                self._sizes[name] = (size, f"{root}/meta/info.json")

    @property
    def stored(self) -> tuple[str, ...]:
        """Columns of pictures that rows have themselves."""
        return tuple(c for c in self._columns.values() if c not in self.videos)

    def expect(self, rows: Iterable[RowOfEpisode]) -> None:
        """Say which rows' pictures will be read, so that no video is decoded twice.

        Raises:
            ArtifactError: a video ends before its rows.
        """
        self._pictures.expect(self._in_video(row, c) for row in rows for c in self.videos)

    def images(self, row: RowOfEpisode) -> dict[str, NDArray[np.uint8]]:
        """Return the picture of each camera.  uint8 [h, w, 3]

        Raises:
            ArtifactError: one is missing, damaged, of another size, or no RGB picture.
        """
        return {camera: self._image(row, camera) for camera in self._columns}

    def compressed(self, row: RowOfEpisode, camera: str) -> bytes:
        """Return an image file's bytes: a row's own, or a PNG of a video's picture.

        Raises:
            ArtifactError: it is missing, or the video is damaged.
        """
        column = self._columns[camera]
        if column in self.videos:
            return encode_png(self._image(row, camera))
        return picture_bytes(row.table[column][row.row].as_py(), self._place(row, column))

    def close(self) -> None:
        """Close open videos."""
        self._pictures.close()

    def _place(self, row: RowOfEpisode, column: str) -> str:
        return row.span.place(self._root, row.frame, column)

    def _image(self, row: RowOfEpisode, camera: str) -> NDArray[np.uint8]:
        column = self._columns[camera]
        place = self._place(row, column)
        if column in self.videos:
            image = self._pictures.read(self._in_video(row, column))
        else:
            data = self.compressed(row, camera)
        try:
            if column not in self.videos:
                image = decode_png(data)
            require_picture(image.shape[1], image.shape[0])
        except ArtifactError as error:
            raise ArtifactError(f"{place}: {error}") from None
        size, first = self._sizes.setdefault(camera, (image.shape, place))
        if image.shape != size:
            raise ArtifactError(
                f"{place}: the picture is {image.shape[0]} x {image.shape[1]}, but {first} has "
                f"{size[0]} x {size[1]}; bring all pictures of a camera to one size"
            )
        return image

    def _in_video(self, row: RowOfEpisode, column: str) -> VideoPicture:
        """Return where a row's picture is in its video."""
        place = self._place(row, column)
        video = row.span.videos[column]
        last = (len(row.span) - 1) / self._fps
        timestamp = row.table["timestamp"][row.row].as_py()
        seconds = video.seconds_at(timestamp, last, 0.5 / self._fps, place)
        file = path_inside(self._root, video.file, place)
        return VideoPicture(file, seconds, place, column, video.start + last)
