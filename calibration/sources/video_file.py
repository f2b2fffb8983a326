"""Pictures of one video file by their presentation times, decoded from the key frame before."""

from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.git_lfs import refuse_pointer

# A picture this near to the time that is asked for is the nearest: no camera takes 10 kHz.
_EXACT_S = 1e-4
# Of a picture that a file announces, which is allocated before it shows whether that is true.
_LIMITS = {"max_pixels": str(1 << 26)}
_COPY = "copy or download the data set anew, with its videos"


class _Decoded(NamedTuple):
    seconds: float
    frame: Any


class VideoFile:
    """An open video whose pictures are asked for by time, at best in ascending order.

    No stretch is decoded twice for times in ascending order, and none between the last picture
    and the key frame before the next one.

    Raises:
        ArtifactError: the file is missing, or holds no video that can be read.
        QvlaError: PyAV is not installed.
    """

    def __init__(self, path: Path) -> None:
        try:
            import av
        except ImportError:
            raise QvlaError(f"{path} is a video, which PyAV reads: pip install av") from None
        self._path = path
        self._damage = (av.error.FFmpegError, EOFError, ValueError)
        _require_video(path)
        try:
            self._container = av.open(str(path))
        except self._damage as error:
            raise self._damaged(error) from None
        if not self._container.streams.video:
            self.close()
            raise ArtifactError(f"{path} holds no video; {_COPY}")
        self._stream = self._container.streams.video[0]
        self._tick = float(self._stream.time_base or 0)
        if self._stream.codec_context is None or not self._tick:
            self.close()
            raise ArtifactError(f"{path} is of a codec or times that FFmpeg does not know; {_COPY}")
        _make_strict(self._stream.codec_context)
        self._reformatter = av.video.reformatter.VideoReformatter()
        self._keys = self._read_keys()
        self._frames: Iterator[Any] | None = None
        # The last picture decoded, and the one before it.
        self._last: _Decoded | None = None
        self._before: _Decoded | None = None

    @property
    def start(self) -> float:
        """Seconds at which the first picture begins, as the file's header says."""
        return float(self._stream.start_time or 0) * self._tick

    @property
    def end(self) -> float | None:
        """Seconds at which the last picture ends; None if the file's header does not say."""
        if self._stream.duration is None:
            return None
        return self.start + float(self._stream.duration) * self._tick

    def picture(self, seconds: float, tolerance: float) -> NDArray[np.uint8]:
        """Return the RGB picture whose presentation time is nearest.  uint8 [h, w, 3]

        Raises:
            ArtifactError: none is within the tolerance, it is damaged, or it is no colour picture.
        """
        try:
            nearest = self._nearest(seconds)
        except self._damage as error:
            raise self._damaged(error) from None
        if nearest is None:
            raise self._damaged(ValueError("no picture"))
        if abs(nearest.seconds - seconds) > tolerance:
            raise ArtifactError(
                f"{self._path} has no picture at {seconds:.6f} s, the nearest is at "
                f"{nearest.seconds:.6f} s; {_COPY}, or write its videos and timestamps anew"
            )
        return self._rgb(nearest.frame)

    def close(self) -> None:
        """Close the file."""
        self._frames = None
        self._container.close()

    def _damaged(self, error: Exception) -> ArtifactError:
        text = " ".join(str(error).split())
        return ArtifactError(f"{self._path} is a truncated or damaged video ({text}); {_COPY}")

    def _read_keys(self) -> list[tuple[float, int]]:
        """Return presentation time and decoding timestamp of the key frames, in order.

        The index knows decoding timestamps alone. Pictures are shown later than decoded by a
        constant where there is any reordering; where it is not constant, `_nearest` looks back.
        """
        entries = list(self._stream.index_entries)
        if not entries:
            return []
        delay = (self._stream.start_time or 0) - entries[0].timestamp
        keys = [entry.timestamp for entry in entries if entry.is_keyframe]
        return [((stamp + delay) * self._tick, stamp) for stamp in sorted(keys)]

    def _key_before(self, seconds: float) -> int:
        return bisect_right(self._keys, seconds + _EXACT_S, key=lambda key: key[0]) - 1

    def _nearest(self, seconds: float) -> _Decoded | None:
        key = self._key_before(seconds)
        if not self._reaches(seconds, key):
            self._seek(key)
            while self._advance() and key > 0 and self._last_seconds() > seconds + _EXACT_S:
                key -= 1
                self._seek(key)
        while self._last_seconds() < seconds - _EXACT_S and self._advance():
            pass
        near = [decoded for decoded in (self._before, self._last) if decoded is not None]
        return min(near, key=lambda decoded: abs(decoded.seconds - seconds), default=None)

    def _reaches(self, seconds: float, key: int) -> bool:
        """Return whether decoding on from here reaches a time, and no key frame is nearer to it."""
        if self._frames is None or self._last is None:
            return False
        held = self._before or self._last
        return held.seconds <= seconds + _EXACT_S and key <= self._key_before(self._last.seconds)

    def _last_seconds(self) -> float:
        return self._last.seconds if self._last else -np.inf

    def _seek(self, key: int) -> None:
        stamp = self._keys[key][1] if key >= 0 and self._keys else (self._stream.start_time or 0)
        self._container.seek(stamp, stream=self._stream, backward=True)
        self._frames = iter(self._container.decode(self._stream))
        self._last = self._before = None

    def _advance(self) -> bool:
        """Decode the next picture; False at the end."""
        frame = next(self._frames, None) if self._frames else None
        if frame is None:
            return False
        if frame.pts is None:
            raise ValueError("a picture without a presentation timestamp")
        decoded = _Decoded(frame.pts * self._tick, frame)
        if decoded.seconds <= self._last_seconds():
            raise ValueError("presentation timestamps that go back")
        self._before, self._last = self._last, decoded
        return True

    def _rgb(self, frame: Any) -> NDArray[np.uint8]:
        if frame.is_corrupt:
            raise self._damaged(ValueError(f"the picture at {frame.time:.6f} s"))
        channels = frame.format.components
        if len(channels) == 1 and channels[0].bits > 8:
            raise ArtifactError(
                f"{self._path} has pictures of one channel of {channels[0].bits} bits, as depth "
                "is; name only colour cameras with --camera NAME=COLUMN"
            )
        try:
            rgb = self._reformatter.reformat(frame, format="rgb24").to_ndarray()
        except self._damage as error:
            raise self._damaged(error) from None
        return np.asarray(rgb, np.uint8)


def _make_strict(codec: Any) -> None:
    """Make a decoder refuse what it finds wrong, which it else hides behind a guess.

    Neither AV1 nor H.264 has checksums of pictures. Of 300 AV1 files with three wrong bytes dav1d
    decoded 11 to other pictures, with its strict checks none (PyAV 18.1.0). FFmpeg's own decoders
    guess in more than one thread, whatever they are told.
    """
    if codec.name == "libdav1d":
        codec.options = {"strict": "strict", **_LIMITS}
    else:
        codec.options = {"err_detect": "crccheck+bitstream+buffer+explode", **_LIMITS}
        codec.thread_count = 1


def _require_video(path: Path) -> None:
    if not path.is_file():
        raise ArtifactError(f"a video of the dataset is missing: {path}; {_COPY}")
    refuse_pointer(path)
