"""Data sets as others publish them: columns, values and pictures as they mean them, or refused."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changed_datasets import (
    DATA,
    FRAMES,
    IMAGE,
    NUMBER,
    STATE,
    drawn_from,
    edit_features,
    rename,
    set_column,
)
from PIL import Image

from calibration.calibration_set import CalibrationSet
from calibration.sources.image_codec import encode_png
from calibration.sources.lerobot import KeyMap, LeRobotDataset
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.data_source import ColumnOptions, open_dataset
from qvla_export.pipeline.progress import Progress
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.errors import ArtifactError, QvlaError


def pictures(data: bytes) -> list[dict[str, Any]]:
    return [{"bytes": data, "path": None}] * (FRAMES * NUMBER)


def test_openpis_names_are_known(original: Path, root: Path) -> None:
    rename(root, {IMAGE: "image", STATE: "state", "action": "actions"})
    dataset = LeRobotDataset(root)
    assert (dataset.keys.state, dataset.keys.action) == ("state", "actions")
    assert drawn_from(dataset).digest == drawn_from(LeRobotDataset(original)).digest
    assert np.array_equal(dataset[0].action, LeRobotDataset(original)[0].action)


def test_a_state_may_be_several_columns_as_droids(original: Path, root: Path) -> None:
    states = np.array(pq.read_table(root / DATA)[STATE].to_pylist(), np.float32)
    rename(root, {STATE: "joint_position"})
    set_column(root / DATA, "joint_position", states[:, :3].tolist(), pa.list_(pa.float32()))
    set_column(root / DATA, "gripper_position", states[:, 3].tolist(), pa.float32())
    edit_features(root, lambda f: f.update(gripper_position={"dtype": "float32", "shape": [1]}))
    for column in (STATE, "joint_position,gripper_position"):
        dataset = open_dataset(root, ColumnOptions(state_column=column))
        assert drawn_from(dataset).digest == drawn_from(LeRobotDataset(original)).digest
    alone = open_dataset(root, ColumnOptions(state_column="gripper_position"))
    assert np.array_equal(alone[2].observation.state, states[2, 3:])


def test_the_action_may_be_another_column_or_none(original: Path, root: Path) -> None:
    actions = np.array(pq.read_table(root / DATA)["action"].to_pylist(), np.float32)
    rename(root, {"action": "command"})
    set_column(root / DATA, "gripper", actions[:, 0].tolist(), pa.float32())
    edit_features(root, lambda f: f.update(gripper={"dtype": "float32", "shape": [1]}))
    both = open_dataset(root, ColumnOptions(action_column="command,gripper"))
    assert np.array_equal(both[7].action, [*actions[7], actions[7, 0]])
    assert both.width(both.keys.action) == 5
    for column in ("", "action"):
        assert open_dataset(root, ColumnOptions(action_column=column))[7].action.shape == (0,)
    with pytest.raises(QvlaError, match=r"the dataset has no torque; its keys are .*command"):
        open_dataset(root, ColumnOptions(action_column="torque"))
    assert drawn_from(both).digest == drawn_from(LeRobotDataset(original)).digest


def test_calibration_needs_no_action(original: Path, root: Path) -> None:
    pq.write_table(pq.read_table(root / DATA).drop_columns(["action"]), root / DATA)
    edit_features(root, lambda f: f.pop("action"))
    dataset = LeRobotDataset(root)
    assert dataset[0].action.shape == (0,)
    assert drawn_from(dataset).digest == drawn_from(LeRobotDataset(original)).digest


def test_instructions_may_be_a_column_of_texts(root: Path) -> None:
    texts = [f"do {row}" for row in range(FRAMES * NUMBER)]
    set_column(root / DATA, "language_instruction", texts)
    edit_features(root, lambda f: f.update(language_instruction={"dtype": "string", "shape": [1]}))
    dataset = open_dataset(root, ColumnOptions(instruction_column="language_instruction"))
    assert [dataset[i].observation.instruction for i in (0, 7, 39)] == ["do 0", "do 7", "do 39"]
    assert dataset.identity() != LeRobotDataset(root).identity()
    numbers = open_dataset(root, ColumnOptions(instruction_column="index"))
    with pytest.raises(ArtifactError, match="column index: an instruction is a text, got int"):
        numbers[0]


def test_a_feature_without_dtype_is_no_camera(original: Path, root: Path) -> None:
    edit_features(root, lambda f: f.update(notes={"shape": [1]}, more=3))
    assert drawn_from(LeRobotDataset(root)).digest == drawn_from(LeRobotDataset(original)).digest
    with pytest.raises(QvlaError, match="notes: not an image but of no dtype"):
        LeRobotDataset(root, KeyMap({"image": "notes"}))


def test_cameras_of_one_name_or_one_column_are_refused(root: Path) -> None:
    image = pq.read_table(root / DATA)[IMAGE].combine_chunks()
    rename(root, {IMAGE: "observation.images.left.rgb"})
    set_column(root / DATA, "observation.images.right.rgb", image.to_pylist(), image.type)
    edit_features(
        root,
        lambda f: f.update(
            {"observation.images.right.rgb": {"dtype": "image", "shape": [28, 28, 3]}}
        ),
    )
    with pytest.raises(QvlaError, match=r"left.rgb, .*right.rgb would all be camera rgb.*--camera"):
        LeRobotDataset(root)
    columns = tuple(f"{side}=observation.images.{side}.rgb" for side in ("left", "right"))
    both = open_dataset(root, ColumnOptions(columns))
    assert both.cameras == ("left", "right")
    with pytest.raises(QvlaError, match=r"cameras a, b would all show column .*left\.rgb"):
        open_dataset(root, ColumnOptions(tuple(f"{n}=observation.images.left.rgb" for n in "ab")))
    with pytest.raises(QvlaError, match="names a camera twice"):
        open_dataset(root, ColumnOptions(tuple(f"a={c.partition('=')[2]}" for c in columns)))


def deep_png(kind: int, channels: int) -> bytes:
    """Return a PNG of 28 x 28 pixels with 16 bits a channel; Pillow writes grey ones only."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 28, 28, 16, kind, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\x9c\x40" * 28 * channels) * 28)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize(
    ("kind", "channels"),
    [(0, 1), (4, 2), (2, 3), (6, 4)],
    ids=["grey", "grey alpha", "RGB", "RGBA"],
)
def test_depth_is_no_colour(root: Path, kind: int, channels: int) -> None:
    """Pillow opens all but plain grey as 8 bits a channel."""
    set_column(root / DATA, IMAGE, pictures(deep_png(kind, channels)))
    with pytest.raises(
        ArtifactError, match=rf"{root}, episode 1, frame 2, column {IMAGE}: .*16-bit depth"
    ):
        LeRobotDataset(root)[FRAMES + 2]


def test_a_path_without_a_picture_is_named(root: Path) -> None:
    rows = [{"bytes": None, "path": f"images/{row}.png"} for row in range(FRAMES * NUMBER)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    set_column(root / DATA, IMAGE, rows, kind)
    with pytest.raises(
        ArtifactError, match=rf"episode 1, frame 2, column {IMAGE} .* path 'images/7.png'; write"
    ):
        LeRobotDataset(root)[FRAMES + 2]


def test_pictures_of_a_camera_have_one_size(root: Path) -> None:
    rows = pq.read_table(root / DATA)[IMAGE].to_pylist()
    rows[FRAMES + 2] = {"bytes": encode_png(np.zeros((28, 36, 3), np.uint8)), "path": None}
    set_column(root / DATA, IMAGE, rows)
    dataset = LeRobotDataset(root)
    assert dataset[0].observation.images["image"].shape == (28, 28, 3)
    with pytest.raises(
        ArtifactError, match=r"episode 1, frame 2, .* is 28 x 36, but .*episode 0, frame 0,"
    ):
        dataset[FRAMES + 2]


@pytest.mark.parametrize(
    ("value", "rule"),
    [(["1", "2", "3", "4"], "no vectors of numbers"), ("1.5", "no vectors"), ([], "no numbers")],
)
def test_a_state_is_numbers(root: Path, value: Any, rule: str) -> None:
    """Texts of numbers were read as these, and no number as a policy without a state."""
    set_column(root / DATA, STATE, [value] * (FRAMES * NUMBER))
    with pytest.raises(ArtifactError, match=rf"frame 2, column {STATE} holds {rule}.*--state-c"):
        LeRobotDataset(root)[2]


def test_states_have_one_width(root: Path) -> None:
    rows = pq.read_table(root / DATA)[STATE].to_pylist()
    set_column(root / DATA, STATE, [row[:3] if n >= FRAMES else row for n, row in enumerate(rows)])
    dataset = LeRobotDataset(root)
    dataset[0]
    with pytest.raises(
        ArtifactError, match=r"episode 1, frame 2, .* 3 numbers, but .*frame 0, .* 4"
    ):
        dataset[FRAMES + 2]


def test_pictures_changed_in_place_are_drawn_anew(root: Path, tmp_path: Path) -> None:
    heard: list[Progress] = []

    def draw() -> CalibrationSet:
        request = CalibrationRequest(LeRobotDataset(root), count=4, held_out=4)
        return calibrate(RunFolder(tmp_path / "run"), request, heard.append)

    first = draw()
    assert draw().digest == first.digest
    rows = pq.read_table(root / DATA)[IMAGE].to_pylist()
    for row in rows:
        with Image.open(io.BytesIO(row["bytes"])) as image:
            row["bytes"] = encode_png(255 - np.asarray(image))
    set_column(root / DATA, IMAGE, rows)
    changed = draw()
    assert [p.state for p in heard if p.state != "running"] == ["made", "kept", "made"]
    inverted = 255 - first.observations[0].images["image"]
    assert np.array_equal(changed.observations[0].images["image"], inverted)
