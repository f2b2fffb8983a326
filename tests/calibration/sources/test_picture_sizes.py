"""Pictures of data sets have the bounds of those that are sent to a server, whatever holds them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from small_sources import write_calib, write_calvin
from small_videos import DATA, SETS

from calibration.sources.formats import open_source
from calibration.sources.lerobot import LeRobotDataset
from qvla_export.shared.errors import ArtifactError


def png_head(width: int, height: int, bits: int) -> bytes:
    """Return a PNG of grey pixels that says its size, and has none."""
    body = b"IHDR" + struct.pack("!IIBBBBB", width, height, bits, 0, 0, 0, 0)
    head = struct.pack("!I", 13) + body + struct.pack("!I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack("!I", 0) + b"IDAT" + bytes(4)


@pytest.mark.parametrize(("side", "reason"), [(9_000, "no camera's"), (13_000, "exceeds limit")])
def test_a_file_is_refused_by_its_head(tmp_path: Path, side: int, reason: str) -> None:
    """13,000 x 13,000 pixels of one bit took 1.9 GB."""
    root = write_calib(tmp_path / "calib")
    (root / "img/3.png").write_bytes(png_head(side, side, 1))
    with pytest.raises(ArtifactError, match=f"episode 3, .* in the dataset is .*{reason}"):
        open_source(root).frame(3, 0)


def test_a_strip_of_pixels_is_no_picture(tmp_path: Path) -> None:
    """Resizing it to a square would enlarge it without end."""
    root = write_calvin(tmp_path / "calvin")
    arrays = dict(np.load(root / "episode_0000001.npz"))
    arrays["rgb_static"] = np.zeros((1, 8000, 3), np.uint8)
    np.savez(root / "episode_0000001.npz", **arrays)
    with pytest.raises(ArtifactError, match=r"frame 1, .* no camera's: .*got 8000 x 1"):
        open_source(root).frame(0, 1)


def test_a_video_s_pictures_have_the_bounds_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvla_export.shared.pictures.picture_bounds.MOST_PIXELS", 50)
    with pytest.raises(ArtifactError, match=r"episode 0, frame 0, .* may have 50 pixels"):
        LeRobotDataset(DATA / next(iter(SETS))).episode(0)
