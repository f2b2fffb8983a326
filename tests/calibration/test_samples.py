"""Calibration sets: seeded draws, held-out episodes, files that vouch for themselves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_datasets import INSTRUCTIONS, write_small_dataset

from calibration.benchmarks.metaworld.tasks import find_task
from calibration.calibration_set import (
    CalibrationSet,
    describe,
    sample_dataset,
    sample_simulator,
)
from calibration.sources.lerobot import LeRobotDataset
from qvla_export.shared.errors import ArtifactError, QvlaError
from qvla_export.shared.observation import Observation


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> LeRobotDataset:
    root = tmp_path_factory.mktemp("samples") / "small"
    return LeRobotDataset(write_small_dataset(root, [6] * 8))


@pytest.fixture(scope="module")
def drawn(dataset: LeRobotDataset) -> CalibrationSet:
    return sample_dataset(dataset, 5, 4, seed=0)


def episode_of(observation: Observation) -> int:
    """Tell the episode by its red level."""
    return int(observation.images["image"][0, 0, 0])


def test_as_many_observations_as_asked_for(drawn: CalibrationSet) -> None:
    assert (len(drawn.observations), len(drawn.held_out)) == (5, 4)
    for observation in (*drawn.observations, *drawn.held_out):
        number = episode_of(observation)
        assert observation.instruction == INSTRUCTIONS[number % 3]
        assert observation.images["image"].shape == (28, 28, 3)
        assert observation.state.shape == (4,)


@pytest.mark.parametrize("seed", range(5))
def test_held_out_frames_come_from_other_episodes(dataset: LeRobotDataset, seed: int) -> None:
    drawn = sample_dataset(dataset, 7, 6, seed)
    measured = {episode_of(o) for o in drawn.observations}
    judged = {episode_of(o) for o in drawn.held_out}
    assert not measured & judged
    assert len(measured) == 4
    assert len(judged) == 3


def test_a_frame_is_drawn_once(dataset: LeRobotDataset) -> None:
    drawn = sample_dataset(dataset, 8, 8, 3)
    frames = [o.images["image"].tobytes() for o in (*drawn.observations, *drawn.held_out)]
    assert len(set(frames)) == 16


def test_the_seed_decides(dataset: LeRobotDataset, drawn: CalibrationSet) -> None:
    assert sample_dataset(dataset, 5, 4, seed=0).digest == drawn.digest
    assert sample_dataset(dataset, 5, 4, seed=1).digest != drawn.digest


def test_the_digest_is_of_content_and_order(drawn: CalibrationSet) -> None:
    first, *others = drawn.observations
    image = first.images["image"].copy()
    image[3, 3, 1] ^= 1
    state = first.state + np.float32(1e-6)
    changed = [
        replace(drawn, observations=(*others, first)),
        replace(
            drawn, observations=(first, *others, drawn.held_out[0]), held_out=drawn.held_out[1:]
        ),
        replace(drawn, observations=(replace(first, images={"image": image}), *others)),
        replace(
            drawn, observations=(replace(first, images={"other": first.images["image"]}), *others)
        ),
        replace(drawn, observations=(replace(first, state=state), *others)),
        replace(drawn, observations=(replace(first, instruction="stop"), *others)),
    ]
    digests = {drawn.digest, *(other.digest for other in changed)}
    assert len(digests) == len(changed) + 1


def test_saved_and_loaded_it_is_the_same(drawn: CalibrationSet, tmp_path: Path) -> None:
    drawn.save(tmp_path / "set")
    loaded = CalibrationSet.load(tmp_path / "set")
    assert loaded.digest == drawn.digest
    assert loaded.source == drawn.source
    for ours, theirs in zip(loaded.held_out, drawn.held_out, strict=True):
        assert ours.instruction == theirs.instruction
        assert (ours.images["image"] == theirs.images["image"]).all()
        assert ours.state.tolist() == theirs.state.tolist()
    name = loaded.source["dataset"]
    columns = "image: observation.images.image, state: observation.state"
    assert describe(loaded) == f"5 observations, 4 held out, from {name} ({columns})"


def test_equal_sets_are_equal_files(
    dataset: LeRobotDataset, drawn: CalibrationSet, tmp_path: Path
) -> None:
    drawn.save(tmp_path / "a")
    sample_dataset(dataset, 5, 4, seed=0).save(tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_a_truncated_file_is_named_with_the_remedy(drawn: CalibrationSet, tmp_path: Path) -> None:
    path = tmp_path / "set"
    for name in ("observations.safetensors", "calibration.json"):
        drawn.save(path)
        data = (path / name).read_bytes()
        for kept in (0, 7, len(data) // 2, len(data) - 3):
            (path / name).write_bytes(data[:kept])
            with pytest.raises(ArtifactError) as caught:
                CalibrationSet.load(path)
            assert str(path) in str(caught.value)
        (path / name).unlink()
        with pytest.raises(ArtifactError, match=r"qvla calibrate|not found"):
            CalibrationSet.load(path)


def test_a_changed_file_is_refused(drawn: CalibrationSet, tmp_path: Path) -> None:
    drawn.save(tmp_path / "set")
    tensors = tmp_path / "set" / "observations.safetensors"
    data = bytearray(tensors.read_bytes())
    data[-100] ^= 1
    tensors.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"was changed .* digest .* recorded .* qvla calibrate"):
        CalibrationSet.load(tmp_path / "set")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("format", "qvla-calibration-0"),
        ("instructions", ["too few"]),
        ("instructions", [""] * 9),
        ("instructions", None),
        ("cameras", ["wrist"]),
        ("calibration", "five"),
        ("calibration", 4),
        ("source", None),
        ("digest", None),
    ],
)
def test_a_changed_description_is_refused(
    drawn: CalibrationSet, tmp_path: Path, field: str, value: object
) -> None:
    drawn.save(tmp_path / "set")
    path = tmp_path / "set" / "calibration.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ArtifactError, match="qvla calibrate"):
        CalibrationSet.load(tmp_path / "set")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}"])
def test_another_json_is_no_calibration_set(tmp_path: Path, text: str) -> None:
    (tmp_path / "calibration.json").write_text(text)
    with pytest.raises(ArtifactError, match="qvla calibrate"):
        CalibrationSet.load(tmp_path)


def test_too_few_episodes_are_counted(dataset: LeRobotDataset) -> None:
    with pytest.raises(QvlaError, match=r"10 \+ 8 observations need 9 episodes, .* has 8"):
        sample_dataset(dataset, 10, 8, seed=0)


def test_episodes_of_one_frame_are_too_short(tmp_path: Path) -> None:
    dataset = LeRobotDataset(write_small_dataset(tmp_path / "short", [1] * 4))
    assert len(sample_dataset(dataset, 1, 1, seed=0).observations) == 1
    with pytest.raises(QvlaError, match="too short"):
        sample_dataset(dataset, 4, 4, seed=0)


@pytest.mark.parametrize(("count", "held_out"), [(0, 4), (4, 0), (-1, 4)])
def test_nothing_asked_for_is_an_error(dataset: LeRobotDataset, count: int, held_out: int) -> None:
    with pytest.raises(QvlaError, match="at least 1 each"):
        sample_dataset(dataset, count, held_out, seed=0)
    with pytest.raises(QvlaError, match="at least 1 each"):
        sample_simulator(["drawer-open"], count, held_out, seed=0)


def test_observations_that_differ_in_kind_are_not_written(
    drawn: CalibrationSet, tmp_path: Path
) -> None:
    first = drawn.held_out[0]
    image = first.images["image"]
    odd = {
        r"images of camera 'image' must have one size": {"images": {"image": image[:20]}},
        r"must have the cameras \['image'\]": {"images": {"image": image, "wrist": image}},
        r"states must have one size": {"state": first.state[:3]},
    }
    for message, change in odd.items():
        mixed = replace(drawn, held_out=(replace(first, **change), *drawn.held_out[1:]))  # type: ignore[arg-type]
        with pytest.raises(QvlaError, match=message):
            mixed.save(tmp_path / "set")
    with pytest.raises(QvlaError, match="at least one observation"):
        CalibrationSet((), (), {}).save(tmp_path / "set")
    assert not list(tmp_path.iterdir())


def test_another_data_set_of_the_same_name_is_another_source(tmp_path: Path) -> None:
    first = LeRobotDataset(write_small_dataset(tmp_path / "a" / "demos", [3, 3]))
    second = LeRobotDataset(write_small_dataset(tmp_path / "b" / "demos", [3, 4]))
    assert first.identity() == first.identity()
    assert first.identity()["dataset"] == second.identity()["dataset"] == "demos"
    assert first.identity() != second.identity()


def test_the_simulator_gives_every_task_and_the_same_again() -> None:
    tasks = ["drawer-close", "handle-press"]
    drawn = sample_simulator(tasks, 2, 2, seed=5)
    phrases = {name: find_task(name).instructions for name in tasks}
    # One episode a task: the first is measured on, the second judges.
    assert {o.instruction for o in drawn.observations} <= {*phrases["drawer-close"]}
    assert {o.instruction for o in drawn.held_out} <= {*phrases["handle-press"]}
    assert drawn.source["simulator"] == tasks
    assert sample_simulator(tasks, 2, 2, seed=5).digest == drawn.digest
    assert sample_simulator(tasks[:1], 1, 1, seed=6).digest != drawn.digest


def test_the_simulator_needs_known_tasks() -> None:
    with pytest.raises(QvlaError, match="at least one task"):
        sample_simulator([], 2, 2, seed=0)
    with pytest.raises(QvlaError, match="no task is called 'make-tea'"):
        sample_simulator(["make-tea"], 2, 2, seed=0)
