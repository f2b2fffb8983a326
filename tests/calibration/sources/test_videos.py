"""Data sets with video: the pictures that plain PyAV decodes, each decoded once."""

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_videos import (
    CAMERAS,
    DATA,
    LENGTHS,
    SETS,
    Picture,
    decode,
    read_all,
    video_of,
    write_video,
)

from calibration.calibration_set import CalibrationSet, sample_dataset
from calibration.sources.image_codec import decode_png
from calibration.sources.lerobot import LeRobotDataset
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.run_folder import RunFolder


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
