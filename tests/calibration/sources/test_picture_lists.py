"""Lists of pictures: the official code's lines, and ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from small_sources import write_calib, write_list

from calibration.calibration_set import sample_dataset
from calibration.sources.base import BadFrame
from calibration.sources.formats import open_source
from calibration.sources.lerobot_columns import KeyMap
from qvla_export.shared.errors import ArtifactError


def test_lists_of_pictures_are_read(tmp_path: Path) -> None:
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    source = open_source(root, KeyMap({"full_image": "front", "wrist_image": "wrist"}))
    assert source.episode_lengths == (2, 2, 2)
    frame = source.frame(2, 1)
    assert frame.observation.instruction == "do 2"
    np.testing.assert_array_equal(frame.observation.state, np.float32(rows[5]["state"]))
    np.testing.assert_array_equal(frame.action, np.float32(rows[5]["action"]))
    assert frame.observation.images["full_image"].shape == (10, 10, 3)
    lines = "\n".join(json.dumps(row) for row in rows)
    (root / "frames.jsonl").write_text(lines)
    with pytest.raises(ArtifactError, match="holds 2 lists of pictures"):
        open_source(root)
    again = open_source(root / "frames.jsonl")
    np.testing.assert_array_equal(again.frame(2, 1).action, frame.action)


def test_the_official_codes_lines_are_read(tmp_path: Path) -> None:
    root = write_calib(tmp_path / "calib")
    source = open_source(root)
    assert source.episode_lengths == (1,) * 5
    frame = source.frame(3, 0)
    assert frame.observation.instruction == "pick up 3"
    assert frame.observation.state.size == frame.action.size == 0
    (root / "img/3.png").unlink()
    with pytest.raises(ArtifactError, match=r"episode 3, .*picture not found: .*img/3.png"):
        source.frame(3, 0)
    with (root / "calib.jsonl").open("a") as file:
        file.write('{"text": "", "image": "img/0.png"}\n{"text": "no picture"}\n')
    with pytest.raises(ArtifactError, match=r"calib.jsonl, line 7, image: a text .* got nothing"):
        open_source(root)


def test_what_some_rows_have_the_others_need(tmp_path: Path) -> None:
    """What the first row lacked was left out of all, without a word."""
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    del rows[0]["state"], rows[0]["images"]["wrist"]
    (root / "frames.json").write_text(json.dumps(rows))
    source = open_source(root)
    assert source.cameras == ("front", "wrist")
    assert source.frame(0, 1).observation.state.shape == (4,)
    with pytest.raises(ArtifactError, match=r"\[0\]: no picture of wrist is listed"):
        source.frame(0, 0)
    with pytest.raises(ArtifactError, match=r"\[0\].state: a list of numbers .* got nothing"):
        open_source(root, KeyMap({"front": "front"})).frame(0, 0)


def test_each_camera_of_a_list_has_its_own_picture(tmp_path: Path) -> None:
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    rows[3]["images"]["wrist"] = rows[3]["images"]["front"]
    (root / "frames.json").write_text(json.dumps(rows))
    with pytest.raises(ArtifactError, match=r"frames.json, \[3\]: each camera has a picture"):
        open_source(root)


def test_states_of_other_formats_have_one_width(tmp_path: Path) -> None:
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    rows[4]["state"] = [1.0]
    (root / "frames.json").write_text(json.dumps(rows))
    source = open_source(root)
    source.frame(0, 0)
    with pytest.raises(ArtifactError, match=r"episode 2, frame 0, .* 1 numbers, but .* has 4"):
        source.frame(2, 0)


def test_rows_of_an_episode_follow_each_other(tmp_path: Path) -> None:
    """Its frames were two episodes, and held out from themselves."""
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    (root / "frames.json").write_text(json.dumps([rows[i] for i in (0, 2, 3, 1, 4, 5)]))
    with pytest.raises(ArtifactError, match=r"frames.json, \[3\]: episode 0 has ended before"):
        open_source(root)


def test_rows_without_state_or_instruction_are_named_or_left_out(tmp_path: Path) -> None:
    root = write_list(tmp_path / "list")
    rows = json.loads((root / "frames.json").read_text())
    rows[0]["state"] = None
    rows[2]["state"][1] = None
    rows[4]["instruction"] = " "
    (root / "frames.json").write_text(json.dumps(rows))
    source = open_source(root)
    for episode, message in enumerate(
        ("column state: number 0 .* nan", "column state: number 1 .* nan", "instruction is empty")
    ):
        with pytest.raises(BadFrame, match=f"episode {episode}, frame 0, .*{message}"):
            source.frame(episode, 0)
    drawn = sample_dataset(source, 1, 1, 0, 1, skip_bad_frames=True)
    assert all(np.isfinite(o.state).all() for o in (*drawn.observations, *drawn.held_out))
    rows[1]["state"] = "none"
    (root / "frames.json").write_text(json.dumps(rows))
    with pytest.raises(ArtifactError, match=r"frames.json, \[1\].state: a list of numbers"):
        open_source(root).frame(0, 1)
