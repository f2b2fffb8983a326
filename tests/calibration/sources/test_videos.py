"""Data sets with video: the pictures that plain PyAV decodes, each decoded once, or a refusal."""

import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from places import ROOT

from calibration.calibration_set import CalibrationSet, sample_dataset
from calibration.sources.image_codec import decode_png
from calibration.sources.lerobot import LeRobotDataset
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.errors import ArtifactError, QvlaError

DATA = ROOT / "tests/data/videos"
SETS = ("av1_v30", "h264_v30", "mixed_v21")
# As tests/data/videos/write_videos.py wrote them.
LENGTHS = (7, 10, 5, 9, 8, 6)
FILES = ((0, 1, 2), (3, 4, 5))
CAMERAS = ("top", "wrist")
TOP = "observation.images.top"

Picture = NDArray[np.uint8]


def decode(path: Path) -> list[Picture]:
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


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[tuple[int, int], dict[str, Picture]]]:
    return {name: read_all(DATA / name) for name in SETS}


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a set that a test may change."""
    return lambda name: Path(shutil.copytree(DATA / name, tmp_path / name))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[float]]:
    """Return the times of the pictures that are decoded from now on, by file."""
    times: dict[str, list[float]] = {}
    really_open = av.open

    class Counted:
        def __init__(self, path: str, *rest: Any, **options: Any) -> None:
            self._container = really_open(path, *rest, **options)
            self._times = times.setdefault(path, [])

        def __getattr__(self, name: str) -> Any:
            return getattr(self._container, name)

        def decode(self, *streams: Any) -> Iterator[Any]:
            for frame in self._container.decode(*streams):
                self._times.append(frame.time)
                yield frame

    monkeypatch.setattr(av, "open", Counted)
    return times


def shown(image: Picture) -> tuple[int, int]:
    """Return the episode that red says, and the frame that the white bar says."""
    bar = image[:, :, 2].astype(int) + image[:, :, 0] + image[:, :, 1]
    start = int(np.argmax(bar[5:-5].mean(0) > 640))
    red = np.median(image[..., 0])
    return round((float(red) - 20) / 30), round(start / 4)


@pytest.mark.parametrize("name", SETS)
def test_every_frame_is_the_one_that_was_written(name: str, expected: Any) -> None:
    dataset = LeRobotDataset(DATA / name)
    assert dataset.episode_lengths == LENGTHS and dataset.cameras == CAMERAS
    places = [(e, f) for e, length in enumerate(LENGTHS) for f in range(length)]
    random.Random(name).shuffle(places)
    for episode, number in places:
        images = dataset.frame(episode, number).observation.images
        for camera in CAMERAS:
            assert np.array_equal(images[camera], expected[name][episode, number][camera])
            assert shown(images[camera]) == (episode, number)
    dataset.close()
    assert dataset.frame(0, 0).observation.images["top"].shape == (48, 64, 3)


def places_of_states(root: Path) -> dict[bytes, tuple[int, int]]:
    """Return episode and frame of each state."""
    columns = ("observation.state", "episode_index", "frame_index")
    tables = [pq.read_table(path) for path in sorted(root.glob("data/chunk-000/*.parquet"))]
    rows = (row for t in tables for row in zip(*(t[c].to_pylist() for c in columns), strict=True))
    return {np.array(state, np.float32).tobytes(): (int(e), int(f)) for state, e, f in rows}


@pytest.mark.parametrize("name", SETS)
def test_calibrate_draws_what_independent_code_reads(
    name: str, expected: Any, tmp_path: Path
) -> None:
    request = CalibrationRequest(LeRobotDataset(DATA / name), (), 6, 5, frames_per_episode=2)
    calibrate(RunFolder(tmp_path / "run"), request)
    drawn = CalibrationSet.load(tmp_path / "run/calibration")
    everything = [*drawn.observations, *drawn.held_out]
    assert len(everything) == 11
    places = places_of_states(DATA / name)
    for observation in everything:
        right = expected[name][places[observation.state.tobytes()]]
        assert all(np.array_equal(observation.images[c], right[c]) for c in CAMERAS)
    assert {o.instruction for o in everything} == {"pick up the cube", "open the drawer"}


@pytest.mark.parametrize("name", SETS)
def test_what_is_drawn_is_decoded_once_and_nothing_else_of_v30_is(
    name: str, decoded: dict[str, list[float]]
) -> None:
    sample_dataset(LeRobotDataset(DATA / name), 8, 4, 0, frames_per_episode=2)
    assert decoded
    for path, times in decoded.items():
        assert len(times) == len(set(times)), f"{path} was decoded twice"
    if name == "av1_v30":
        # A key frame every other picture: at most one before each that is drawn.
        assert sum(map(len, decoded.values())) <= 2 * 12 * len(CAMERAS)


def test_one_frame_costs_its_key_frame(decoded: dict[str, list[float]]) -> None:
    LeRobotDataset(DATA / "av1_v30").frame(1, 6)
    # Episode 1 begins at picture 7: frame 6 is picture 13, whose key frame is 12.
    assert [[round(15 * t) for t in times] for times in decoded.values()] == [[12, 13]] * 2


def test_playing_an_episode_decodes_it_once(decoded: dict[str, list[float]]) -> None:
    for _ in LeRobotDataset(DATA / "h264_v30").frames(0):
        pass
    assert [[round(30 * t) for t in times] for times in decoded.values()] == [list(range(7))] * 2


def test_an_episode_whole_has_its_pictures_without_loss(expected: Any) -> None:
    episode = LeRobotDataset(DATA / "mixed_v21").episode(4)
    for number in range(LENGTHS[4]):
        for camera in CAMERAS:
            image = decode_png(episode.images[camera][number])
            assert np.array_equal(image, expected["mixed_v21"][4, number][camera])


def test_bad_frames_are_left_out_before_anything_is_decoded(
    copy: Callable[[str], Path], decoded: dict[str, list[float]]
) -> None:
    root = copy("h264_v30")
    for path in sorted(root.glob("data/chunk-000/*.parquet")):
        table = pq.read_table(path)
        states = table["observation.state"].to_pylist()
        frames = table["frame_index"].to_pylist()
        bad = [None if frame % 2 else state for frame, state in zip(frames, states, strict=True)]
        array = pa.array(bad, pa.list_(pa.float32()))
        place = table.column_names.index("observation.state")
        pq.write_table(table.set_column(place, "observation.state", array), path)
    drawn = sample_dataset(LeRobotDataset(root), 6, 6, 0, skip_bad_frames=True)
    assert all(shown(o.images["top"])[1] % 2 == 0 for o in (*drawn.observations, *drawn.held_out))
    assert drawn.source["bad_frames"] > 0
    assert all(len(times) == len(set(times)) for times in decoded.values())


def write_video(path: Path, pictures: list[Picture], fps: int = 30, first: int = 0) -> None:
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


def test_videos_changed_in_place_are_drawn_anew(
    copy: Callable[[str], Path], tmp_path: Path
) -> None:
    root = copy("mixed_v21")

    def draw() -> CalibrationSet:
        request = CalibrationRequest(LeRobotDataset(root), (), 6, 6)
        return calibrate(RunFolder(tmp_path / "run"), request)

    first = draw()
    assert draw().digest == first.digest
    for episode in range(len(LENGTHS)):
        path, _ = video_of(root, episode, "wrist")
        write_video(path, [255 - image for image in decode(path)])
    assert draw().digest != first.digest


def test_pictures_are_found_by_time_not_by_number(
    copy: Callable[[str], Path], expected: Any
) -> None:
    """A video of twice the rate holds every second picture for no row."""
    root = copy("mixed_v21")
    for episode, length in enumerate(LENGTHS):
        path, _ = video_of(root, episode, "top")
        doubled = [image for image in decode(path) for _ in range(2)]
        for number in range(1, 2 * length, 2):
            doubled[number] = 255 - doubled[number]
        write_video(path, doubled, fps=60)
    dataset = LeRobotDataset(root)
    for number in range(LENGTHS[2]):
        assert shown(dataset.frame(2, number).observation.images["top"]) == (2, number)


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
