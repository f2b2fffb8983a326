"""Videos that do not fit their rows, or are damaged: refused, and never another row's picture."""

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_videos import DATA, LENGTHS, SETS, Picture, decode, read_all, video_of, write_video

from calibration.sources.lerobot import LeRobotDataset
from qvla_export.shared.errors import ArtifactError, QvlaError

TOP = "observation.images.top"


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[tuple[int, int], dict[str, Picture]]]:
    return {name: read_all(DATA / name) for name in SETS}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a set that a test may change."""
    return lambda name: Path(shutil.copytree(DATA / name, tmp_path / name))


def edit_json(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_table(path: Path, column: str, value: Callable[[Any], Any]) -> None:
    table = pq.read_table(path)
    kind = table.schema.field(column).type
    array = pa.array([value(v) for v in table[column].to_pylist()], kind)
    pq.write_table(table.set_column(table.column_names.index(column), column, array), path)


def of_top(name: str) -> str:
    return f"videos/{TOP}/{name}"


EPISODES = "meta/episodes/chunk-000/file-000.parquet"
ROWS = "data/chunk-000/file-000.parquet"


def top(root: Path) -> Path:
    return video_of(root, 1, "top")[0]


def flip_bytes(root: Path) -> None:
    data = bytearray(top(root).read_bytes())
    start = data.index(b"mdat") + 4
    for place in range(start + 700, start + 1400, 7):
        data[place] ^= 0x5A
    top(root).write_bytes(data)


def keep_only(root: Path, count: int) -> None:
    write_video(top(root), decode(top(root))[:count])


def as_depth(root: Path) -> None:
    pictures = decode(top(root))
    with av.open(str(top(root)), "w", format="matroska") as container:
        stream = container.add_stream("ffv1", rate=30)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = "gray16le"
        for image in pictures:
            depth = image[..., 0].astype(np.uint16) * 200
            container.mux(stream.encode(av.VideoFrame.from_ndarray(depth, format="gray16le")))
        container.mux(stream.encode(None))


# What is done to a set, and what reading frame 6 of episode 1 says of it.
WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "missing": ("av1_v30", lambda r: top(r).unlink(), "a video of the dataset is missing: .*mp4;"),
    "empty": ("av1_v30", lambda r: top(r).write_bytes(b""), "is a truncated or damaged video"),
    "half": (
        "h264_v30",
        lambda r: top(r).write_bytes(top(r).read_bytes()[: top(r).stat().st_size // 2]),
        r"truncated or damaged video \(.*\); copy or download the data set anew, with its videos",
    ),
    "av1 bytes": ("av1_v30", flip_bytes, "is a truncated or damaged video"),
    "h264 bytes": ("h264_v30", flip_bytes, "is a truncated or damaged video"),
    "pointer": (
        "av1_v30",
        lambda r: top(r).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "is not the file but a pointer of Git LFS to it; fetch it .*git lfs pull",
    ),
    "no video": ("mixed_v21", lambda r: write_sound(top(r)), "holds no video; copy"),
    "size": (
        "av1_v30",
        lambda r: edit_json(r, lambda i: i["features"][TOP].update(shape=[3, 64, 48])),
        r"the picture is 48 x 64, but .*meta/info.json has 64 x 48; bring all pictures",
    ),
    "shorter file": (
        "mixed_v21",
        lambda r: keep_only(r, 8),
        r"ends at 0\.26\d+ s, but the episode's last row is at 0\.300000 s: the video is shorter",
    ),
    "shorter file of several": (
        "h264_v30",
        lambda r: keep_only(r, 15),
        r"ends at 0\.500000 s, but the episode's last row is at 0\.533333 s: the video is shorter",
    ),
    "later start": (
        "mixed_v21",
        lambda r: write_video(top(r), decode(top(r)), first=2),
        r"begins at 0\.06\d+ s, not at 0: its rows' pictures would be others",
    ),
    "shorter in metadata": (
        "h264_v30",
        lambda r: edit_table(r / EPISODES, of_top("to_timestamp"), lambda v: v - 0.05),
        r"0\.233333 to 0\.516667 s of videos/.*, but its rows go to 0\.533333 s and this one is at",
    ),
    "between pictures": (
        "av1_v30",
        lambda r: write_video(top(r), decode(top(r))[:1] * 4, fps=2),
        r"has no picture at 0\.866667 s, the nearest is at 1\.000000 s; copy",
    ),
    "before the episode": (
        "av1_v30",
        lambda r: edit_table(r / ROWS, "timestamp", lambda v: v - 1),
        r"meta/episodes has the episode at 0\.466667 to 1\.133333 s .* this one is at -0\.13",
    ),
    "time of no row": (
        "av1_v30",
        lambda r: edit_table(r / ROWS, "timestamp", lambda v: math.nan),
        "found by their row's timestamp, which is nan; write the dataset's timestamps anew",
    ),
    "time of no episode": (
        "av1_v30",
        lambda r: edit_table(r / EPISODES, of_top("from_timestamp"), lambda v: math.nan),
        rf"episode 0, column videos/{TOP}: .* from a time to a later one, got nan to 0\.46",
    ),
    "file of no episode": (
        "av1_v30",
        lambda r: edit_table(r / EPISODES, of_top("file_index"), lambda v: None),
        rf"episode 0, column videos/{TOP}/file_index: a whole number from 0 on is needed, got None",
    ),
    "depth in info": (
        "h264_v30",
        lambda r: edit_json(
            r, lambda i: i["features"][TOP]["info"].update({"video.is_depth_map": True})
        ),
        rf"{TOP}: depth, as info.json says, .*name only colour cameras with --camera NAME=COLUMN",
    ),
    "depth in pictures": ("mixed_v21", as_depth, "pictures of one channel of 16 bits, as depth"),
    "a path elsewhere": (
        "av1_v30",
        lambda r: edit_json(r, lambda i: i.update(video_path="../{video_key}/{file_index}.mp4")),
        r"video_path: a path below the dataset is needed.* got '\.\./",
    ),
    "a path that asks": (
        "av1_v30",
        lambda r: edit_json(r, lambda i: i.update(video_path="{video_key.__class__}.mp4")),
        "video_path: a path below the dataset is needed, with no fields but",
    ),
    "a path that grows": (
        "mixed_v21",
        lambda r: edit_json(r, lambda i: i.update(video_path="{episode_index:09999999d}.mp4")),
        "video_path: a path below the dataset is needed",
    ),
    "a path of numbers": (
        "mixed_v21",
        lambda r: edit_json(r, lambda i: i.update(video_path=[3])),
        "video_path: a path below the dataset is needed",
    ),
}


def write_sound(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_named(what: str, copy: Callable[[str], Path]) -> None:
    name, break_it, message = WRONG[what]
    root = copy(name)
    break_it(root)
    with pytest.raises(QvlaError, match=message) as refused:
        LeRobotDataset(root).frame(1, 6)
    opened = not any(part in what for part in ("no episode", "in info", "a path"))
    if opened:
        assert f"{root}, episode 1, frame 6, column {TOP}: " in str(refused.value)


def test_the_first_frame_of_another_episode_is_never_taken(copy: Callable[[str], Path]) -> None:
    """Metadata that counts one row too many for a video is refused before it shows."""
    root = copy("h264_v30")
    edit_table(root / EPISODES, of_top("to_timestamp"), lambda v: v - 1 / 30)
    for frame in (0, LENGTHS[1] - 1):
        with pytest.raises(ArtifactError, match="the video is shorter than its rows"):
            LeRobotDataset(root).frame(1, frame)


def test_without_pyav_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(QvlaError, match=r"which PyAV reads: pip install"):
        LeRobotDataset(DATA / "av1_v30").frame(0, 0)


@pytest.mark.parametrize("name", ["av1_v30", "h264_v30"])
def test_damaged_bytes_are_noticed_or_harmless(
    name: str, copy: Callable[[str], Path], expected: Any
) -> None:
    root = copy(name)
    intact = top(root).read_bytes()
    first, end = intact.index(b"mdat") + 4, intact.index(b"moov") - 4
    chance = random.Random(7)
    noticed = 0
    for _ in range(30):
        data = bytearray(intact)
        for _ in range(3):
            data[chance.randrange(first, end)] ^= chance.randrange(1, 256)
        top(root).write_bytes(data)
        dataset = LeRobotDataset(root)
        try:
            images = [dataset.frame(1, f).observation.images["top"] for f in range(LENGTHS[1])]
        except QvlaError:
            noticed += 1
            continue
        right = [expected[name][1, f]["top"] for f in range(LENGTHS[1])]
        assert all(np.array_equal(a, b) for a, b in zip(images, right, strict=True))
    assert noticed > 5
