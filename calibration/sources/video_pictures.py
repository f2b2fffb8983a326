"""Pictures of many video files, each stretch of which is decoded once where they are announced."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from calibration.sources.video_file import VideoFile
from qvla_export.shared.errors import ArtifactError


@dataclass(frozen=True, order=True)
class VideoPicture:
    """One picture of a video, and whose it is."""

    file: Path
    seconds: float
    # Names dataset, episode, frame and column.
    place: str
    column: str
    # Seconds that the episode's last picture begins at in the file.
    last: float


# Of the time between two frames: how far a picture may be from its row. Timestamps that are written
# at another rate than the video's name another row's picture sooner or later, and of rows that do,
# nine in ten or so are farther than this from any. LeRobot itself allows 0.1 ms.
_NEAR = 0.05


class VideoPictures:
    """Reads pictures by time; one file a column stays open."""

    def __init__(self, fps: float) -> None:
        self._half = 0.5 / fps
        # A timestamp in milliseconds, or one in float32 hours after the start, is near.
        self._tolerance = max(_NEAR / fps, 1e-3)
        self._open: dict[str, tuple[Path, VideoFile]] = {}
        # What is to be read soon, by file; and what was decoded and not taken yet.
        self._announced: dict[Path, set[VideoPicture]] = {}
        self._ready: dict[VideoPicture, NDArray[np.uint8]] = {}

    def expect(self, pictures: Iterable[VideoPicture]) -> None:
        """Say which pictures will be read, so that each file is decoded once, in its order.

        What an earlier announcement named and nobody read is forgotten.
        """
        self._announced.clear()
        self._ready.clear()
        for picture in pictures:
            self._announced.setdefault(picture.file, set()).add(picture)

    def read(self, picture: VideoPicture) -> NDArray[np.uint8]:
        """Return an RGB picture.  uint8 [h, w, 3]

        Raises:
            ArtifactError: its file is missing, damaged or shorter than the episode, or has no
                picture at that time.
        """
        if picture in self._ready:
            return self._ready.pop(picture)
        together = self._announced.pop(picture.file, set())
        if picture not in together:
            return self._decode(picture)
        self._ready |= {each: self._decode(each) for each in sorted(together)}
        return self._ready.pop(picture)

    def close(self) -> None:
        """Close every file, and forget what was announced."""
        for _, video in self._open.values():
            video.close()
        self._open.clear()
        self.expect(())

    def _decode(self, picture: VideoPicture) -> NDArray[np.uint8]:
        try:
            video = self._video(picture)
            if abs(video.start) > self._half:
                raise ArtifactError(
                    f"{picture.file} begins at {video.start:.6f} s, not at 0: its rows' pictures "
                    "would be others; write the video anew"
                )
            if video.end is not None and picture.last > video.end - self._half:
                raise ArtifactError(
                    f"{picture.file} ends at {video.end:.6f} s, but the episode's last row is at "
                    f"{picture.last:.6f} s: the video is shorter than its rows; copy or download "
                    "it anew"
                )
            return video.picture(picture.seconds, self._tolerance)
        except ArtifactError as error:
            raise ArtifactError(f"{picture.place}: {error}") from None

    def _video(self, picture: VideoPicture) -> VideoFile:
        path, video = self._open.get(picture.column, (None, None))
        if video is None or path != picture.file:
            if video is not None:
                video.close()
                del self._open[picture.column]
            video = VideoFile(picture.file)
            self._open[picture.column] = (picture.file, video)
        return video
