"""Values as other writers leave them: what they mean is read, what only looks right is refused."""

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changed_datasets import DATA, IMAGE, STATE, edit_info, set_column
from PIL import Image
from small_datasets import write_small_dataset
from small_records import droid_episode, write_records
from small_sources import write_list

from calibration.sources.formats import open_source
from calibration.sources.lerobot import LeRobotDataset
from calibration.sources.lerobot_columns import KeyMap
from qvla_export.shared.errors import ArtifactError

NUMBER, LINKED = 6, "data/chunk-000/file-001.parquet"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_small_dataset(tmp_path_factory.mktemp("odd") / "original", [3, 3], side=8)


@pytest.fixture
def root(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may change: two episodes of three frames."""
    return Path(shutil.copytree(original, tmp_path / "dataset"))


def picture(mode: str, colour: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (8, 8), colour).save(file, "PNG", **options)
    return file.getvalue()


def show(root: Path, data: bytes) -> Any:
    set_column(root / DATA, IMAGE, [{"bytes": data, "path": None}] * NUMBER)
    return LeRobotDataset(root).frame(1, 1).observation.images["image"]


@pytest.mark.parametrize(
    ("mode", "colour", "seen"),
    [
        ("L", 100, (100, 100, 100)),
        ("LA", (100, 255), (100, 100, 100)),
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("P", 0, (0, 0, 0)),
    ],
)
def test_pictures_of_other_modes_are_rgb(
    root: Path, mode: str, colour: Any, seen: tuple[int, ...]
) -> None:
    image = show(root, picture(mode, colour))
    assert image.shape == (8, 8, 3) and (image == seen).all()


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (picture("RGBA", (10, 20, 30, 0)), "of transparent pixels"),
        (picture("LA", (100, 254)), "of transparent pixels"),
        (picture("P", 0, transparency=0), "of transparent pixels"),
        (picture("1", 1), "a mask of one bit"),
    ],
)
def test_what_is_no_camera_s_picture_is_refused(root: Path, data: bytes, what: str) -> None:
    """A mask was a black and white picture, and what lies below transparent pixels was shown."""
    with pytest.raises(ArtifactError, match=rf"frame 1, column {IMAGE}: .*{what}.*--camera"):
        show(root, data)


def split(root: Path, kind: pa.DataType, values: list[Any] | None = None) -> None:
    """Put the second frame and what follows into a file whose states are of another type."""
    table = pq.read_table(root / DATA)
    first, rest = table.slice(0, 1), table.slice(1)
    place = rest.column_names.index(STATE)
    states = values or rest[STATE].to_pylist()
    pq.write_table(rest.set_column(place, STATE, pa.array(states, kind)), root / LINKED)
    pq.write_table(first, root / DATA)


def test_files_may_differ_in_how_wide_their_numbers_are(original: Path, root: Path) -> None:
    expected = LeRobotDataset(original).episode(0)
    split(root, pa.list_(pa.float64(), 4))
    episode = LeRobotDataset(root).episode(0)
    assert np.array_equal(episode.state, expected.state)
    assert np.array_equal(episode.action, expected.action)


def test_files_of_other_columns_are_named(root: Path) -> None:
    split(root, pa.string(), ["closed"] * 5)
    with pytest.raises(ArtifactError, match=r"other types in one file than in another \(.*state"):
        LeRobotDataset(root).episode(0)


def test_two_columns_of_one_name_are_refused(root: Path) -> None:
    table = pq.read_table(root / DATA)
    doubled = pa.Table.from_arrays([*table.columns, table[STATE]], [*table.column_names, STATE])
    pq.write_table(doubled, root / DATA)
    with pytest.raises(ArtifactError, match=f"has several columns named {STATE}; write"):
        LeRobotDataset(root).frame(0, 0)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (pa.float16(), [np.float16(0.5), np.float16(-2)]),
        (pa.uint8(), [3, 255]),
        (pa.int64(), [-1, 1 << 20]),
        (pa.bool_(), [True, False]),
    ],
)
def test_numbers_are_read_whatever_their_type(root: Path, kind: Any, values: list[Any]) -> None:
    set_column(root / DATA, "action", [values] * NUMBER, pa.list_(kind))
    assert LeRobotDataset(root).frame(0, 2).action.tolist() == [float(v) for v in values]


def test_a_comma_at_the_end_names_nothing(root: Path) -> None:
    """It was answered with "the dataset has no images"."""
    expected = LeRobotDataset(root).frame(0, 1).observation.state
    for columns in (f"{STATE},", f" ,{STATE} , "):
        state = LeRobotDataset(root, KeyMap(state=columns)).frame(0, 1).observation.state
        assert np.array_equal(state, expected)


def test_texts_may_be_stored_as_bytes_or_numbered(root: Path) -> None:
    edit_info(root, lambda i: i["features"].update(said={"dtype": "string", "shape": [1]}))
    for values in ([b"open it"] * NUMBER, pa.array(["open it"] * NUMBER).dictionary_encode()):
        set_column(root / DATA, "said", values)
        source = open_source(root, KeyMap(instruction="said"))
        assert source.frame(0, 0).observation.instruction == "open it"


def test_zeros_behind_a_text_are_no_part_of_it(tmp_path: Path) -> None:
    root = write_records(tmp_path, [droid_episode(instruction=b"open it\0\0\0")])
    assert open_source(root).frame(0, 1).observation.instruction == "open it"


@pytest.mark.parametrize("format_name", ["lerobot", "rlds", "list"])
def test_printed_bytes_are_no_instruction(root: Path, tmp_path: Path, format_name: str) -> None:
    """A prompt began with b' where a conversion took str() of bytes."""
    printed = str(b"open it")
    if format_name == "lerobot":
        numbers = pq.read_table(root / "meta/tasks.parquet")["task_index"]
        tasks = pa.table({"task_index": numbers, "task": [printed] * len(numbers)})
        pq.write_table(tasks, root / "meta/tasks.parquet")
    elif format_name == "rlds":
        root = write_records(tmp_path / "rlds", [droid_episode(instruction=printed.encode())])
    else:
        root = write_list(tmp_path / "list")
        text = (root / "frames.json").read_text()
        (root / "frames.json").write_text(text.replace('"do 0"', f'"{printed}"'))
    with pytest.raises(
        ArtifactError, match=r"frame 0, .*: the instruction is b'open it', .*--instruction TEXT"
    ):
        open_source(root).frame(0, 0)
    told = open_source(root, KeyMap(one_instruction="open it")).frame(0, 0)
    assert told.observation.instruction == "open it"
