"""Columns, paths and instructions as other writers name and store them."""

import io
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changed_datasets import DATA, edit_info, set_column
from PIL import Image, ImageOps
from places import ROOT
from small_datasets import INSTRUCTIONS, write_small_dataset
from small_records import droid_episode, jpeg, write_records
from small_sources import write_version_2

from calibration.sources.formats import open_source
from calibration.sources.lerobot import LeRobotDataset
from calibration.sources.lerobot_columns import KeyMap
from qvla_export.shared.errors import ArtifactError, QvlaError

NUMBER = 6


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two episodes of three frames."""
    return write_small_dataset(tmp_path / "dataset", [3, 3], side=8)


def add_column(root: Path, name: str, values: list[Any], kind: str) -> None:
    set_column(root / DATA, name, values)
    edit_info(root, lambda i: i["features"].setdefault(name, {"dtype": kind, "shape": [1]}))


def instruction(root: Path, keys: KeyMap, episode: int = 1) -> str:
    return open_source(root, keys).frame(episode, 0).observation.instruction


def test_a_column_of_whole_numbers_counts_tasks(root: Path) -> None:
    """GR00T's annotations are of `meta/tasks`."""
    column = "annotation.human.task_description"
    add_column(root, column, [1, 1, 1, 0, 0, 0], "int64")
    assert instruction(root, KeyMap(instruction=column), 0) == INSTRUCTIONS[1]
    assert instruction(root, KeyMap(instruction=column), 1) == INSTRUCTIONS[0]
    add_column(root, column, [7] * NUMBER, "int64")
    with pytest.raises(ArtifactError, match=f"column {column}: task_index 7 is not in meta/tasks"):
        instruction(root, KeyMap(instruction=column))
    # Others are of other tables, or count.
    add_column(root, "subtask_index", [0] * NUMBER, "int64")
    with pytest.raises(ArtifactError, match="column subtask_index: an instruction is a text"):
        instruction(root, KeyMap(instruction="subtask_index"))


def test_a_list_of_one_text_is_a_text(root: Path) -> None:
    add_column(root, "language", [["open it"]] * NUMBER, "string")
    assert instruction(root, KeyMap(instruction="language")) == "open it"
    add_column(root, "language", [["open it", "now"]] * NUMBER, "string")
    with pytest.raises(ArtifactError, match="an instruction is a text, got list"):
        instruction(root, KeyMap(instruction="language"))


def test_rows_without_tasks_are_answered_with_the_options(root: Path) -> None:
    add_column(root, "task", ["open it"] * NUMBER, "string")
    table = pq.read_table(root / DATA)
    pq.write_table(table.drop_columns(["task_index"]), root / DATA)
    with pytest.raises(ArtifactError, match=r"lacks .*task_index.*--instruction-column COLUMN"):
        instruction(root, KeyMap())
    assert instruction(root, KeyMap(instruction="task")) == "open it"


def flatten(root: Path) -> str:
    """Put the files of a data set of version 2.1 into one folder; return its template."""
    for path in sorted((root / "data/chunk-000").iterdir()):
        path.rename(root / "data" / path.name)
    return "data/episode_{episode_index:06d}.parquet"


def test_version_2_s_files_are_where_info_says(tmp_path: Path) -> None:
    root = write_version_2(tmp_path / "dataset")
    usual = LeRobotDataset(root).frame(2, 1)
    template = flatten(root)
    with pytest.raises(ArtifactError, match=r"missing: .*chunk-000/episode_000002.parquet"):
        LeRobotDataset(root).frame(2, 1)
    edit_info(root, lambda i: i.update(data_path=template))
    frame = LeRobotDataset(root).frame(2, 1)
    assert np.array_equal(frame.action, usual.action)


@pytest.mark.parametrize(
    "template",
    [
        "../{episode_index:06d}.parquet",
        "/data/{episode_index}.parquet",
        "data/{episode_index:99999d}.parquet",
        "data/{other}.parquet",
        "data/{episode_index.__class__}.parquet",
        "data/{",
        7,
    ],
)
def test_paths_of_info_stay_below_the_dataset(tmp_path: Path, template: object) -> None:
    root = write_version_2(tmp_path / "dataset")
    edit_info(root, lambda i: i.update(data_path=template))
    with pytest.raises(ArtifactError, match="data_path: a path below the dataset is needed"):
        LeRobotDataset(root)


def test_a_column_of_videos_does_not_lead_out_of_the_dataset(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ROOT / "tests/data/videos/mixed_v21", tmp_path / "dataset"))
    edit_info(root, lambda i: i["features"].update({"../up": {"dtype": "video"}}))
    with pytest.raises(ArtifactError, match=r"column '\.\./up' leads out of the dataset"):
        LeRobotDataset(root)


def test_numbers_of_episodes_may_have_gaps(tmp_path: Path) -> None:
    root = write_version_2(tmp_path / "dataset")
    last = LeRobotDataset(root).frame(3, 2)
    old, new = (root / f"data/chunk-000/episode_{n:06d}.parquet" for n in (3, 7))
    table = pq.read_table(old)
    place = table.column_names.index("episode_index")
    pq.write_table(table.set_column(place, "episode_index", pa.array([7] * 3)), new)
    old.unlink()
    lines = (root / "meta/episodes.jsonl").read_text()
    (root / "meta/episodes.jsonl").write_text(
        lines.replace('"episode_index": 3', '"episode_index": 7')
    )
    dataset = LeRobotDataset(root)
    assert dataset.episode_lengths == (3, 3, 3, 3)
    assert np.array_equal(dataset.frame(3, 2).action, last.action)


def test_timestamps_of_another_rate_are_no_other_pictures(tmp_path: Path) -> None:
    """Rows at 27.8 frames a second of a video of 30: picture 13 would be that of row 12."""
    root = Path(shutil.copytree(ROOT / "tests/data/videos/mixed_v21", tmp_path / "dataset"))
    for path in root.rglob("*.parquet"):
        table = pq.read_table(path)
        if "timestamp" in table.column_names:
            times = pa.array([1.08 * t for t in table["timestamp"].to_pylist()], pa.float32())
            place = table.column_names.index("timestamp")
            pq.write_table(table.set_column(place, "timestamp", times), path)
    dataset = LeRobotDataset(root)
    assert dataset.frame(0, 0)
    for frame in range(1, 7):
        with pytest.raises(ArtifactError, match=r"has no picture at .*timestamps anew"):
            dataset.frame(0, frame)


def test_timestamps_in_milliseconds_are_near_enough(tmp_path: Path) -> None:
    root = Path(shutil.copytree(ROOT / "tests/data/videos/mixed_v21", tmp_path / "dataset"))
    pictures = [LeRobotDataset(root).frame(0, frame).observation.images for frame in range(7)]
    path = root / "data/chunk-000/episode_000000.parquet"
    table = pq.read_table(path)
    times = pa.array([round(t, 3) for t in table["timestamp"].to_pylist()], pa.float32())
    place = table.column_names.index("timestamp")
    pq.write_table(table.set_column(place, "timestamp", times), path)
    dataset = LeRobotDataset(root)
    for frame, expected in enumerate(pictures):
        for camera, image in dataset.frame(0, frame).observation.images.items():
            assert np.array_equal(image, expected[camera])


def test_a_picture_is_turned_as_its_file_says(root: Path) -> None:
    """As the datasets library decodes it, with which LeRobot reads."""
    pixels = np.arange(8 * 16 * 3, dtype=np.uint8).reshape(8, 16, 3)
    image, exif, file = Image.fromarray(pixels), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(file, "PNG", exif=exif)
    column = "observation.images.image"
    add_column(root, column, [{"bytes": file.getvalue(), "path": None}] * NUMBER, "image")
    seen = LeRobotDataset(root).frame(0, 0).observation.images["image"]
    with Image.open(io.BytesIO(file.getvalue())) as stored:
        assert np.array_equal(seen, np.asarray(ImageOps.exif_transpose(stored)))
    assert seen.shape == (16, 8, 3)


def robomimic(path: Path) -> Path:
    """Write a demonstration that has what came next, and a mask, as robomimic's tools write."""
    with h5py.File(path, "w") as file:
        for group, level in (("obs", 1), ("next_obs", 2)):
            seen = file.create_group(f"data/demo_0/{group}")
            seen["agentview_rgb"] = np.full((4, 6, 6, 3), level, np.uint8)
            for name, size in (("ee_states", 6), ("gripper_states", 2)):
                seen[name] = np.full((4, size), level, np.float64)
            seen["closed"] = np.full((4, 1), level == 1)
        file["data/demo_0/actions"] = np.zeros((4, 7))
        file["mask/train"] = np.array([b"demo_0"])
    return path


def test_what_came_next_is_not_what_was_seen(tmp_path: Path) -> None:
    path = robomimic(tmp_path / "open_the_drawer_demo.hdf5")
    frame = open_source(path).frame(0, 2)
    assert frame.observation.state.tolist() == [1] * 8
    assert {n: int(i.max()) for n, i in frame.observation.images.items()} == {"agentview_rgb": 1}
    both = KeyMap(state="ee_states,closed")
    assert open_source(path, both).frame(0, 0).observation.state.tolist() == [1] * 7


def test_droids_state_is_what_was_seen(tmp_path: Path) -> None:
    root = write_records(tmp_path / "droid", [droid_episode(), droid_episode(4)])
    keys = KeyMap({"image": "wrist_image_left"}, "joint_position,gripper_position")
    frame = open_source(root, keys).frame(1, 3)
    assert frame.observation.state.tolist() == [2] * 7 + [3]
    commanded = KeyMap(state="action_dict/joint_position")
    assert open_source(root, commanded).frame(0, 0).observation.state.tolist() == [-1] * 7
    with pytest.raises(QvlaError, match="no column joint_speed"):
        open_source(root, KeyMap(state="joint_speed"))


def test_a_camera_may_begin_without_pictures(tmp_path: Path) -> None:
    episode = droid_episode()
    column = "steps/observation/wrist_image_left"
    root = write_records(tmp_path / "droid", [{**episode, column: [b"", jpeg(), jpeg()]}])
    source = open_source(root)
    assert "wrist_image_left" in source.cameras
    assert source.frame(0, 1).observation.images["wrist_image_left"].shape == (8, 8, 3)
    with pytest.raises(ArtifactError, match="frame 0, column observation/wrist_image_left: an"):
        source.frame(0, 0)
