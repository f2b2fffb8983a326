"""Data sets as others publish them: read as they mean it, or refused by frame and column."""

import io
import json
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_datasets import make_episode, write_small_dataset

from calibration.calibration_set import CalibrationSet, describe, sample_dataset
from calibration.sources.base import BadFrame
from calibration.sources.image_codec import encode_png
from calibration.sources.lerobot import KeyMap, LeRobotDataset
from calibration.sources.lerobot_writer import write_dataset
from qvla_export.pipeline.calibrate import CalibrationRequest, calibrate
from qvla_export.pipeline.data_source import ColumnOptions, open_dataset
from qvla_export.pipeline.progress import Progress
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.errors import ArtifactError, QvlaError

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
IMAGE, STATE = "observation.images.image", "observation.state"
FRAMES, NUMBER = 5, 8


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dataset(tmp_path_factory.mktemp("brought") / "original", [FRAMES] * NUMBER)


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change: eight episodes of five frames."""
    return Path(shutil.copytree(original, tmp_path / "dataset"))


def drawn_from(dataset: LeRobotDataset, **options: Any) -> CalibrationSet:
    return sample_dataset(dataset, 8, 8, 0, **options)


def set_column(path: Path, name: str, values: Sequence[Any], kind: Any = None) -> None:
    table = pq.read_table(path)
    array = pa.array(values, kind)
    if name in table.column_names:
        table = table.set_column(table.column_names.index(name), name, array)
    else:
        table = table.append_column(name, array)
    pq.write_table(table, path)


def edit_features(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info["features"])
    path.write_text(json.dumps(info))


def rename(root: Path, names: dict[str, str]) -> None:
    table = pq.read_table(root / DATA)
    pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), root / DATA)
    edit_features(
        root, lambda f: f.update({new: f.pop(old) for old, new in names.items() if old in f})
    )


def pictures(data: bytes) -> list[dict[str, Any]]:
    return [{"bytes": data, "path": None}] * (FRAMES * NUMBER)


def test_rows_are_found_by_their_index_whatever_metadata_says_of_files(tmp_path: Path) -> None:
    right = tmp_path / "right"
    with write_dataset(right, 40, "test", file_megabytes=0) as writer:
        for number in range(NUMBER):
            writer.add(make_episode(number, FRAMES))
    expected = drawn_from(LeRobotDataset(right)).digest
    files = pq.read_table(right / EPISODES)["data/file_index"].to_pylist()
    assert files == list(range(NUMBER))
    # As the public converter left it: the episode at a boundary points to the file before.
    set_column(right / EPISODES, "data/file_index", [0, *range(NUMBER - 1)])
    assert drawn_from(LeRobotDataset(right)).digest == expected
    # Rows in any order, and without statistics in the footer.
    for path in right.rglob("data/**/*.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.take(list(reversed(range(FRAMES)))), path, write_statistics=False)
    dataset = LeRobotDataset(right)
    assert drawn_from(dataset).digest == expected
    assert np.array_equal(dataset.episode(3).state, make_episode(3, FRAMES).state)


@pytest.mark.parametrize("column", ["data/file_index", "dataset_from_index", "episode_index"])
def test_whole_numbers_may_be_floats_but_not_missing(
    original: Path, root: Path, column: str
) -> None:
    values = [float(v) for v in pq.read_table(root / EPISODES)[column].to_pylist()]
    set_column(root / EPISODES, column, values)
    expected = drawn_from(LeRobotDataset(original)).digest
    assert drawn_from(LeRobotDataset(root)).digest == expected
    for bad in (float("nan"), None, 0.5, -1.0, float("inf")):
        set_column(root / EPISODES, column, [*values[:3], bad, *values[4:]], pa.float64())
        with pytest.raises(
            ArtifactError, match=rf"{EPISODES}, episode 3, column {column}: a whole"
        ):
            LeRobotDataset(root)
    set_column(root / EPISODES, column, [[0]] * NUMBER)
    with pytest.raises(ArtifactError, match=r"a whole number .* got \[0\]"):
        LeRobotDataset(root)


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


def test_an_instruction_from_outside_needs_no_tasks(root: Path) -> None:
    pq.write_table(pq.read_table(root / DATA).drop_columns(["task_index"]), root / DATA)
    (root / "meta/tasks.parquet").unlink()
    with pytest.raises(ArtifactError, match=r"tasks.parquet; .* say what to do with --instruction"):
        LeRobotDataset(root)
    dataset = open_dataset(root, ColumnOptions(instruction="close the window"))
    assert dataset.frame(1, 2).observation.instruction == "close the window"


@pytest.mark.parametrize("bad", [None, [0.0, 0.0, float("nan"), 0.0]])
def test_frames_of_no_state_are_named_or_left_out(root: Path, bad: object) -> None:
    rows = pq.read_table(root / DATA)[STATE].to_pylist()
    wrong = range(0, FRAMES * NUMBER, 2)
    mixed = [bad if row in wrong else state for row, state in enumerate(rows)]
    set_column(root / DATA, STATE, mixed, pa.list_(pa.float32()))
    dataset = LeRobotDataset(root)
    with pytest.raises(BadFrame, match=rf"episode 0, frame 4, column {STATE}: number .* is nan"):
        dataset[4]
    with pytest.raises(BadFrame, match=r"episode \d, frame \d, .*--skip-bad-frames"):
        drawn_from(dataset)
    drawn = drawn_from(dataset, skip_bad_frames=True)
    states = [o.state.tobytes() for o in (*drawn.observations, *drawn.held_out)]
    good = {np.asarray(row, np.float32).tobytes() for n, row in enumerate(rows) if n not in wrong}
    assert len(set(states)) == 16
    assert good.issuperset(states)
    assert 0 < drawn.source["bad_frames"] <= len(wrong)
    assert sum(drawn.episode_lengths) == 8
    assert f"{drawn.source['bad_frames']} bad frames left out" in describe(drawn)


def test_frames_without_an_instruction_are_named_or_left_out(root: Path) -> None:
    table = pq.read_table(root / "meta/tasks.parquet")
    place = table.column_names.index("task")
    emptied = table.set_column(place, "task", pa.array([None, " ", "close the window"]))
    pq.write_table(emptied, root / "meta/tasks.parquet")
    with pytest.raises(BadFrame, match=r"frame 0, column task_index: the instruction is empty"):
        LeRobotDataset(root)[0]
    drawn = sample_dataset(LeRobotDataset(root), 2, 2, 0, skip_bad_frames=True)
    everything = (*drawn.observations, *drawn.held_out)
    assert {o.instruction for o in everything} == {"close the window"}
    assert drawn.episode_lengths == (2,)
    with pytest.raises(QvlaError, match="too short"):
        sample_dataset(LeRobotDataset(root), 4, 4, 0, skip_bad_frames=True)


@pytest.mark.parametrize(
    ("numbers", "tasks", "rule"),
    [
        (
            [0, 1, 2],
            [["push", "pull"], ["open"], ["close"]],
            r"a text, got \['push', 'pull'\]",
        ),
        ([0, 1, 2], [7, 8, 9], "an instruction is a text, got 7"),
        ([0, 1, 1], ["push", "open", "close"], "1 is 'open' in a row before and 'close' here"),
    ],
)
def test_a_task_is_one_text(root: Path, numbers: list[int], tasks: list[Any], rule: str) -> None:
    """They became "['push', 'pull']", "7", and the last one, without a word."""
    pq.write_table(pa.table({"task_index": numbers, "task": tasks}), root / "meta/tasks.parquet")
    with pytest.raises(ArtifactError, match=rf"meta/tasks.parquet, row \d, column .*{rule}"):
        LeRobotDataset(root)


def test_a_task_may_be_listed_twice(original: Path, root: Path) -> None:
    table = pq.read_table(root / "meta/tasks.parquet")
    pq.write_table(pa.concat_tables([table, table]), root / "meta/tasks.parquet")
    assert drawn_from(LeRobotDataset(root)).digest == drawn_from(LeRobotDataset(original)).digest


def test_leaving_out_changes_nothing_where_all_is_well(original: Path) -> None:
    dataset = LeRobotDataset(original)
    kept = drawn_from(dataset, skip_bad_frames=True)
    assert kept.digest == drawn_from(dataset).digest
    assert kept.source["bad_frames"] == 0


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


def as_version_2(root: Path, version: str, first: int) -> None:
    """Lay a data set out as v2.0 and v2.1 do: a file an episode, JSON lines, no dataset_*_index."""
    table = pq.read_table(root / DATA)
    tasks = pq.read_table(root / "meta/tasks.parquet").to_pylist()
    episodes = pq.read_table(root / EPISODES, columns=["episode_index", "tasks", "length"])
    shutil.rmtree(root / "meta/episodes")
    for path in (root / "meta/tasks.parquet", root / DATA):
        path.unlink()
    lines = [{**row, "episode_index": row["episode_index"] + first} for row in episodes.to_pylist()]
    for name, rows in (("episodes", lines), ("tasks", tasks)):
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for number in range(NUMBER):
        part = table.slice(number * FRAMES, FRAMES)
        path = root / f"data/chunk-000/episode_{number + first:06d}.parquet"
        pq.write_table(part, path)
        set_column(path, "episode_index", [number + first] * FRAMES)
    info = json.loads((root / "meta/info.json").read_text())
    info["codebase_version"] = version
    info["data_path"] = "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet"
    (root / "meta/info.json").write_text(json.dumps(info))


@pytest.mark.parametrize(("version", "first"), [("v2.0", 0), ("v2.1", 3)])
def test_version_2_is_read(original: Path, root: Path, version: str, first: int) -> None:
    as_version_2(root, version, first)
    newer, older = LeRobotDataset(original), LeRobotDataset(root)
    assert older.episode_lengths == newer.episode_lengths
    assert drawn_from(older).digest == drawn_from(newer).digest
    assert older.episode(2).images == newer.episode(2).images
    assert older[7].episode == 1 + first


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"episodes.jsonl, line 1 is not valid JSON"),
        ("[]", r"episodes.jsonl, line 1 holds no JSON object"),
        ('{"episode_index": 0}', r"row 0, column length: a whole number .* got None"),
        ('{"episode_index": NaN, "length": 5}', r"column episode_index: a whole number .* got nan"),
        ('{"episode_index": 0, "length": 0}', r"episode 0 has no frames"),
        ('{"episode_index": 0, "length": 5}', r"counts \(8, 40\) .* has \(1, 5\)"),
    ],
)
def test_damaged_lines_are_named(root: Path, line: str, message: str) -> None:
    as_version_2(root, "v2.1", 0)
    (root / "meta/episodes.jsonl").write_text(line + "\n")
    with pytest.raises(ArtifactError, match=message):
        LeRobotDataset(root)


def _places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from _places(value[key], (*path, key))


_ODD = (None, float("nan"), -1, 0, "", "x", [], {}, [1], True, {"dtype": "image"}, {"dtype": []})


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(data=st.data())
def test_odd_metadata_is_read_or_refused(original: Path, root: Path, data: st.DataObject) -> None:
    info = json.loads((original / "meta/info.json").read_text())
    place = data.draw(st.sampled_from(list(_places(info))))
    holder = info
    for key in place[:-1]:
        holder = holder[key]
    holder[place[-1]] = data.draw(st.sampled_from(_ODD))
    (root / "meta/info.json").write_text(json.dumps(info))
    try:
        dataset = LeRobotDataset(root)
        dataset.width(dataset.keys.state)
        drawn = sample_dataset(dataset, 2, 2, 0)
    except QvlaError:
        return
    assert len(drawn.observations) == len(drawn.held_out) == 2
