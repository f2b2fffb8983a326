"""What to do is read frame by frame: an episode may change its task on the way."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_datasets import INSTRUCTIONS, make_episode, write_small_dataset

from calibration.calibration_set import sample_dataset
from calibration.sources.lerobot import LeRobotDataset
from calibration.sources.lerobot_writer import Episode, write_dataset
from calibration.training.train import REFERENCE_CONFIG
from calibration.training.training_data import load_frames
from qvla_export.shared.errors import QvlaError

FRAMES = 6
DATA = "data/chunk-000/file-000.parquet"
# Rows 0 to 2 of every episode have task 0, the others task 2.
PHRASES = (INSTRUCTIONS[0],) * 3 + (INSTRUCTIONS[2],) * 3


@pytest.fixture
def changing(tmp_path: Path) -> LeRobotDataset:
    root = write_small_dataset(tmp_path / "changing", [FRAMES] * 6)
    table = pq.read_table(root / DATA)
    rows = pa.array([0 if row % FRAMES < 3 else 2 for row in range(6 * FRAMES)])
    column = table.column_names.index("task_index")
    pq.write_table(table.set_column(column, "task_index", rows), root / DATA)
    return LeRobotDataset(root)


def test_an_episode_keeps_what_each_row_says(changing: LeRobotDataset) -> None:
    for number in range(6):
        episode = changing.episode(number)
        phrases = tuple(episode.observation(frame).instruction for frame in range(FRAMES))
        assert phrases == PHRASES
        assert tuple(f.observation.instruction for f in changing.frames(number)) == PHRASES


def test_observations_are_drawn_with_their_own_instruction(changing: LeRobotDataset) -> None:
    of_state = {
        frame.observation.state.tobytes(): frame.observation.instruction
        for number in range(6)
        for frame in changing.frames(number)
    }
    drawn = sample_dataset(changing, 6, 6, seed=0)
    everything = (*drawn.observations, *drawn.held_out)
    assert {o.instruction for o in everything} == {INSTRUCTIONS[0], INSTRUCTIONS[2]}
    assert all(o.instruction == of_state[o.state.tobytes()] for o in everything)


def test_training_shows_each_frame_its_own_prompt(changing: LeRobotDataset) -> None:
    frames = load_frames(changing, REFERENCE_CONFIG, "small", 512)
    index = frames.prompt_index.numpy().reshape(6, FRAMES)
    assert len(np.unique(index)) == 2
    assert (index == index[:, :1]).tolist() == [[True] * 3 + [False] * 3] * 6


def test_what_changes_is_written_and_comes_back(tmp_path: Path) -> None:
    changed = replace(make_episode(0, FRAMES), frame_instructions=PHRASES)
    with write_dataset(tmp_path / "written", 40, "test") as writer:
        writer.add(changed)
        writer.add(make_episode(1, 2))
    read = LeRobotDataset(tmp_path / "written")
    assert read.episode(0).frame_instructions == PHRASES
    assert read.episode(1).frame_instructions == ()
    assert read.episode(1).instruction == INSTRUCTIONS[1]
    assert [read.tasks[i] for i in range(3)] == [INSTRUCTIONS[i] for i in (0, 2, 1)]


def test_every_frame_needs_an_instruction() -> None:
    whole = make_episode(0, FRAMES)
    with pytest.raises(QvlaError, match="'instructions': 2"):
        Episode(whole.instruction, whole.images, whole.state, whole.action, ("a", "b"))
