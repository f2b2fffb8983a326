"""The small data sets with video, read by PyAV alone, and changed videos."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from places import ROOT

DATA = ROOT / "tests/data/videos"
SETS = ("av1_v30", "h264_v30", "mixed_v21")
# As tests/data/videos/write_videos.py wrote them.
LENGTHS = (7, 10, 5, 9, 8, 6)
FILES = ((0, 1, 2), (3, 4, 5))
CAMERAS = ("top", "wrist")
TOP = "observation.images.top"

Picture = NDArray[np.uint8]


def decode(path: Path) -> list[Picture]:
    """Return all pictures of a video."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def video_of(root: Path, episode: int, camera: str) -> tuple[Path, int]:
    """Return the file of an episode and the number of its first picture there, by counting."""
    folder = root / "videos"
    if root.name.endswith("v21"):
        name = f"chunk-000/observation.images.{camera}/episode_{episode:06d}.mp4"
        return folder / name, 0
    file = next(n for n, episodes in enumerate(FILES) if episode in episodes)
    name = f"observation.images.{camera}/chunk-000/file-{file:03d}.mp4"
    return folder / name, sum(LENGTHS[e] for e in FILES[file] if e < episode)


def read_all(root: Path) -> dict[tuple[int, int], dict[str, Picture]]:
    """Return every picture by episode, frame and camera: each file decoded whole, in order."""
    pictures: dict[tuple[int, int], dict[str, Picture]] = {}
    for episode, length in enumerate(LENGTHS):
        for camera in CAMERAS:
            path, first = video_of(root, episode, camera)
            for frame, image in enumerate(decode(path)[first : first + length]):
                pictures.setdefault((episode, frame), {})[camera] = image
    return pictures


def write_video(path: Path, pictures: list[Picture], fps: int = 30, first: int = 0) -> None:
    """Write pictures as H.264, the first of them as picture number `first`."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, fps)
        for number, image in enumerate(pictures, first):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
