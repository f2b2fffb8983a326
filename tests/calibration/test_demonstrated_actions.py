"""What was done from held-out observations on: drawn beside them, named, kept with the set."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from small_datasets import make_episode, write_small_dataset

from calibration.calibration_set import CalibrationSet, sample_dataset, sample_simulator
from calibration.demonstrated_actions import following_actions, pad_following
from calibration.sources.base import Frame
from calibration.sources.lerobot import KeyMap, LeRobotDataset
from calibration.sources.lerobot_columns import number_names
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.progress import Progress
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.errors import ArtifactError

LENGTHS = (9, 3, 80, 12)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dataset(tmp_path_factory.mktemp("demonstrated") / "set", LENGTHS)


def actions_from(episode: int, frame: int) -> NDArray[np.float32]:
    actions = make_episode(episode, LENGTHS[episode]).action
    return np.asarray(actions[frame : frame + 64], np.float32)


def test_each_held_out_observation_has_the_actions_from_it_on(root: Path) -> None:
    drawn = sample_dataset(LeRobotDataset(root), 2, 6, seed=0)
    assert drawn.demonstrations is not None
    assert len(drawn.demonstrations.actions) == 6
    for seen, actions in zip(drawn.held_out, drawn.demonstrations.actions, strict=True):
        episode = int(seen.images["image"][0, 0, 0])  # its red level
        states = make_episode(episode, LENGTHS[episode]).state
        frame = int(np.flatnonzero((states == seen.state).all(axis=1))[0])
        expected = actions_from(episode, frame)
        np.testing.assert_array_equal(actions[: len(expected)], expected)
        assert np.isnan(actions[len(expected) :]).all()


def test_a_source_without_bare_actions_gives_the_same(root: Path) -> None:
    class Plain:
        """Reads whole frames only."""

        def __init__(self, inner: LeRobotDataset) -> None:
            self.root, self.fps, self.cameras = inner.root, inner.fps, inner.cameras
            self.episode_lengths = inner.episode_lengths
            self.identity, self.close, self._inner = inner.identity, inner.close, inner

        def frame(self, episode: int, frame: int) -> Frame:
            return self._inner.frame(episode, frame)

    data = LeRobotDataset(root)
    for episode, frame in ((0, 4), (2, 10), (1, 2)):
        expected = actions_from(episode, frame)
        np.testing.assert_array_equal(following_actions(data, episode, frame), expected)
        np.testing.assert_array_equal(following_actions(Plain(data), episode, frame), expected)


def test_a_set_without_actions_has_no_demonstrations(root: Path) -> None:
    data = LeRobotDataset(root, KeyMap(action=None))
    assert sample_dataset(data, 2, 4, seed=0).demonstrations is None
    assert pad_following([np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)]) is None


def test_demonstrations_are_saved_and_a_changed_file_is_refused(root: Path, tmp_path: Path) -> None:
    drawn = sample_dataset(LeRobotDataset(root), 2, 4, seed=0)
    drawn.save(tmp_path / "set")
    loaded = CalibrationSet.load(tmp_path / "set")
    assert loaded.demonstrations is not None and drawn.demonstrations is not None
    assert loaded.demonstrations.digest == drawn.demonstrations.digest
    # What sensitivities were measured on is the same set without them.
    assert replace(drawn, demonstrations=None).digest == loaded.digest
    other = sample_dataset(LeRobotDataset(root), 2, 4, seed=3).demonstrations
    assert other is not None
    (tmp_path / "set/demonstrations.safetensors").write_bytes(other.pack())
    with pytest.raises(ArtifactError, match="demonstrated actions were changed"):
        CalibrationSet.load(tmp_path / "set")


def test_a_set_drawn_before_actions_were_kept_is_drawn_again(root: Path, tmp_path: Path) -> None:
    run, request = RunFolder(tmp_path), CalibrationRequest(LeRobotDataset(root), (), 2, 4)
    first = calibrate(run, request)
    replace(first, demonstrations=None).save(run.calibration)
    heard: list[Progress] = []
    again = calibrate(run, request, heard.append)
    assert heard[-1].state == "made" and again.demonstrations is not None
    assert again.digest == first.digest  # nothing that was measured on it is lost
    calibrate(run, request, heard.append)
    assert heard[-1].state == "kept"


def test_the_simulators_actions_are_the_experts() -> None:
    drawn = sample_simulator(["drawer-open"], 1, 2, seed=0)
    done = drawn.demonstrations
    assert done is not None and done.names == ("x", "y", "z", "gripper")
    assert done.unit_mm == 20 and done.unit_deg is None
    assert done.actions.shape[::2] == (2, 4) and np.nanmax(abs(done.actions)) <= 1


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "y", "gripper"], ("x", "y", "gripper")),
        ({"motors": ["left_waist", "left_gripper"]}, ("left_waist", "left_gripper")),
        ({"axes": ["x", "y"], "note": "text"}, ("x", "y")),
        (["joint_0", "joint_1"], ("joint_0", "joint_1")),
        (["action_0", "action_1", "action_2"], ()),
        (["gripper", "gripper"], ()),
        (["x", 3], ()),
        (None, ()),
        ("xyz", ()),
    ],
)
def test_names_of_numbers(names: object, expected: tuple[str, ...]) -> None:
    features = {"action": {"names": names}}
    assert number_names(features, ("action",)) == expected
