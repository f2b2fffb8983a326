"""Every format as its own library writes and reads it."""

import json
from pathlib import Path

import h5py
import numpy as np
import pytest
from command_runs import qvla
from small_datasets import write_small_dataset
from small_recordings import served
from small_sources import FOLD, WRITTEN, write_recordings

from calibration.calibration_set import CalibrationSet, sample_dataset
from calibration.sources.formats import open_source
from calibration.sources.frame_source import FrameSource
from calibration.sources.lerobot_columns import KeyMap
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.data_source import ColumnOptions, open_dataset
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.errors import ArtifactError

RLDS = "rlds/libero_tiny"


@pytest.mark.parametrize(
    ("name", "folder", "keys", "cameras"),
    [
        ("rlds", RLDS, KeyMap(), ("image", "wrist_image")),
        ("libero", "libero", KeyMap(), ("agentview_rgb", "eye_in_hand_rgb")),
        ("aloha", "aloha", FOLD, ("cam_high", "cam_left_wrist", "cam_right_wrist")),
    ],
)
def test_frames_are_those_that_the_formats_own_library_reads(
    name: str, folder: str, keys: KeyMap, cameras: tuple[str, ...]
) -> None:
    expected = np.load(WRITTEN / "expected.npz")
    texts = json.loads((WRITTEN / "expected.json").read_text())
    source = open_source(WRITTEN / folder, keys)
    assert source.cameras == cameras
    assert len(source.episode_lengths) == len(
        {key.split("/")[1] for key in expected if name in key}
    )
    for episode, length in enumerate(source.episode_lengths):
        key = f"{name}/{episode}"
        assert length == len(expected[f"{key}/state"])
        phrases = texts.get(f"{key}/instruction", ["fold the towel"] * length)
        for number in range(length):
            frame = source.frame(episode, number)
            for camera in cameras:
                seen = frame.observation.images[camera]
                np.testing.assert_array_equal(seen, expected[f"{key}/{camera}"][number])
            np.testing.assert_array_equal(frame.observation.state, expected[f"{key}/state"][number])
            np.testing.assert_array_equal(frame.action, expected[f"{key}/action"][number])
            assert frame.observation.instruction == phrases[number]
            assert (frame.episode, frame.frame) == (episode, number)
        assert isinstance(source, FrameSource)
        actions = source.actions(episode, 1, length)
        np.testing.assert_array_equal(actions, expected[f"{key}/action"][1:])


@pytest.mark.parametrize(
    ("name", "folder", "columns"),
    [
        ("rlds", RLDS, {"full_image": "image", "wrist_image": "wrist_image"}),
        ("libero", "libero", {"full_image": "agentview_rgb", "wrist_image": "eye_in_hand_rgb"}),
    ],
)
def test_calibrate_draws_what_independent_code_reads(
    tmp_path: Path, name: str, folder: str, columns: dict[str, str]
) -> None:
    options = ColumnOptions(tuple(f"{camera}={column}" for camera, column in columns.items()))
    dataset = open_dataset(WRITTEN / folder, options)
    drawn = calibrate(RunFolder(tmp_path), CalibrationRequest(dataset, count=4, held_out=4))
    expected = np.load(WRITTEN / "expected.npz")
    texts = json.loads((WRITTEN / "expected.json").read_text())
    places = {
        row.tobytes(): (episode, number)
        for episode in range(4)
        for number, row in enumerate(expected[f"{name}/{episode}/state"])
    }
    observations = (*drawn.observations, *drawn.held_out)
    found = [places[o.state.tobytes()] for o in observations]
    assert len(set(found)) == 8 and len({episode for episode, _ in found}) == 4
    for observation, (episode, number) in zip(observations, found, strict=True):
        assert observation.instruction == texts[f"{name}/{episode}/instruction"][number]
        for camera, column in columns.items():
            pixels = expected[f"{name}/{episode}/{column}"][number]
            np.testing.assert_array_equal(observation.images[camera], pixels)


def test_recordings_are_demonstrations(tmp_path: Path) -> None:
    root = write_recordings(tmp_path / "runs")
    source = open_source(root)
    # Each observation has an instruction of its own, and so is an episode.
    assert source.episode_lengths == (1,) * 6
    for number in range(6):
        event, frame = served(number, 8), source.frame(number, 0)
        assert event.observation is not None and event.chunk is not None
        assert frame.observation.instruction == event.observation.instruction
        np.testing.assert_array_equal(frame.observation.state, event.observation.state)
        np.testing.assert_array_equal(frame.action, event.chunk.actions[0])
        assert list(frame.observation.images) == list(event.observation.images)
        for name, image in event.observation.images.items():
            np.testing.assert_array_equal(frame.observation.images[name], image)
    joined = open_source(root, FOLD)
    assert joined.frame(0, 0).observation.instruction == "fold the towel"
    drawn = sample_dataset(source, 2, 2, 0)
    assert len(drawn.observations) == 2


def test_one_instruction_holds_for_every_frame(tmp_path: Path) -> None:
    place = ("--dataset", WRITTEN / "aloha", "--count", 2, "--held-out", 2)
    refused = qvla("calibrate", "--run", tmp_path / "run", *place)
    assert refused.code == 2 and "say it with --instruction TEXT" in refused.err
    done = qvla("calibrate", "--run", tmp_path / "run", *place, "--instruction", "fold it")
    assert done.code == 0, done.err
    drawn = CalibrationSet.load(tmp_path / "run/calibration")
    assert {o.instruction for o in (*drawn.observations, *drawn.held_out)} == {"fold it"}
    lerobot = open_source(write_small_dataset(tmp_path / "demos", [2, 2]), FOLD)
    assert lerobot.frame(1, 1).observation.instruction == "fold the towel"
    assert lerobot.identity()["instruction"] == "fold the towel"


def test_a_format_that_is_not_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.db3").write_bytes(b"")
    with pytest.raises(ArtifactError, match=r"a ROS 2 bag, which is not read; these are: LeRobot"):
        open_source(tmp_path)
    with h5py.File(tmp_path / "mine.hdf5", "w") as file:
        file["poses"] = [1.0]
    with pytest.raises(ArtifactError, match=r"neither LIBERO's, .* nor ALOHA's, .* it has poses"):
        open_source(tmp_path / "mine.hdf5")
    with pytest.raises(ArtifactError, match=f"no recording found: {tmp_path}/nowhere"):
        open_source(tmp_path / "nowhere")
