"""LeRobotDataset v3.0: what is written comes back, and what is broken is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calibration.sources.image_codec import decode_png, encode_png
from calibration.sources.lerobot import KeyMap, LeRobotDataset
from calibration.sources.lerobot_writer import Episode, write_dataset
from qvla_export.shared.errors import ArtifactError, QvlaError

FPS = 20
IMAGE = "observation.images.front"
DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def make_episode(seed: int, length: int, instruction: str = "open", dim: int = 3) -> Episode:
    random = np.random.default_rng(seed)
    pictures = random.integers(0, 256, (length, 6, 8, 3), dtype=np.uint8)
    return Episode(
        instruction,
        {"front": [encode_png(picture) for picture in pictures]},
        random.normal(size=(length, 2)).astype(np.float32),
        random.normal(size=(length, dim)).astype(np.float32),
    )


def write(root: Path, episodes: list[Episode], file_megabytes: int = 100) -> None:
    with write_dataset(root, FPS, "arm", file_megabytes) as writer:
        for episode in episodes:
            writer.add(episode)


def same(one: Episode, other: Episode) -> bool:
    return (
        one.instruction == other.instruction
        and {name: list(pngs) for name, pngs in one.images.items()}
        == {name: list(pngs) for name, pngs in other.images.items()}
        and np.array_equal(one.state, other.state)
        and np.array_equal(one.action, other.action)
    )


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lerobot") / "dataset"
    phrases = ("open", "close", "open")
    write(root, [make_episode(i, 4 + i, phrase) for i, phrase in enumerate(phrases)])
    return root


@pytest.fixture
def dataset(original: Path, tmp_path: Path) -> Path:
    """A copy a test may damage: three episodes of 4, 5 and 6 frames."""
    return Path(shutil.copytree(original, tmp_path / "dataset"))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    phrases=st.lists(st.text("abc ", min_size=1).filter(str.strip), min_size=5, max_size=5),
    file_megabytes=st.sampled_from([0, 100]),
)
def test_episodes_come_back_as_written(
    tmp_path: Path, lengths: list[int], phrases: list[str], file_megabytes: int
) -> None:
    root = tmp_path / "dataset"
    written = [make_episode(i, n, phrases[i]) for i, n in enumerate(lengths)]
    write(root, written, file_megabytes)
    read = LeRobotDataset(root)
    assert len(read) == sum(lengths)
    assert [span.stop - span.start for span in read.episodes] == lengths
    assert all(same(read.episode(i), episode) for i, episode in enumerate(written))
    read.close()


def test_frames_are_reached_in_any_order(dataset: Path) -> None:
    read = LeRobotDataset(dataset)
    expected = make_episode(1, 5, "close")
    for index in (8, 0, 6, 14, 4):
        read[index]
    frame = read[6]
    assert (frame.episode, frame.frame) == (1, 2)
    assert frame.timestamp == pytest.approx(2 / FPS)
    assert frame.observation.instruction == "close"
    assert np.array_equal(
        frame.observation.images["front"], decode_png(expected.images["front"][2])
    )
    assert np.array_equal(frame.observation.state, expected.state[2])
    assert np.array_equal(frame.action, expected.action[2])
    assert [f.frame for f in read.frames(2)] == list(range(6))


@pytest.mark.parametrize("index", [-1, 15])
def test_frames_outside_are_refused(dataset: Path, index: int) -> None:
    with pytest.raises(IndexError, match=r"frame -?\d+ of 15"):
        LeRobotDataset(dataset)[index]
    with pytest.raises(IndexError, match="episode 3 of 3"):
        LeRobotDataset(dataset).episode(3)


def test_small_files_are_split_and_numbered(tmp_path: Path) -> None:
    root = tmp_path / "dataset"
    write(root, [make_episode(i, 2) for i in range(3)], file_megabytes=0)
    names = [path.name for path in sorted(root.glob("data/chunk-000/*"))]
    assert names == ["file-000.parquet", "file-001.parquet", "file-002.parquet"]
    rows = pq.read_table(root / EPISODES).to_pylist()
    assert [row["data/file_index"] for row in rows] == [0, 1, 2]


def test_others_may_group_rows_as_they_like(dataset: Path) -> None:
    before = LeRobotDataset(dataset)
    episodes = [before.episode(i) for i in range(3)]
    table = pq.read_table(dataset / DATA)
    pq.write_table(table, dataset / DATA, row_group_size=4)
    after = LeRobotDataset(dataset)
    assert all(same(after.episode(i), episode) for i, episode in enumerate(episodes))
    assert np.array_equal(after[13].action, episodes[2].action[4])


def test_other_readers_find_their_notes(dataset: Path) -> None:
    schema = pq.read_schema(dataset / DATA)
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features[IMAGE] == {"_type": "Image"}
    assert features["index"] == {"dtype": "int64", "_type": "Value"}
    assert features["action"]["length"] == 3
    assert schema.field(IMAGE).type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert schema.field("action").type == pa.list_(pa.float32(), 3)
    tasks = pq.read_table(dataset / "meta/tasks.parquet")
    assert json.loads(tasks.schema.metadata[b"pandas"])["index_columns"] == ["task"]
    assert tasks.to_pydict() == {"task_index": [0, 1], "task": ["open", "close"]}
    info = json.loads((dataset / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 15, 2)
    assert info["splits"] == {"train": "0:3"}
    assert info["features"][IMAGE]["shape"] == [6, 8, 3]
    (rows,) = [pq.read_table(dataset / EPISODES).to_pylist()]
    assert rows[1]["tasks"] == ["close"]
    assert (rows[1]["dataset_from_index"], rows[1]["dataset_to_index"]) == (4, 9)


def test_statistics_are_those_of_the_data(dataset: Path) -> None:
    stats = json.loads((dataset / "meta/stats.json").read_text())
    episodes = [LeRobotDataset(dataset).episode(i) for i in range(3)]
    actions = np.concatenate([episode.action for episode in episodes]).astype(np.float64)
    for name, value in (
        ("min", actions.min(0)),
        ("mean", actions.mean(0)),
        ("std", actions.std(0)),
    ):
        assert stats["action"][name] == pytest.approx(value.tolist())
    assert stats["action"]["q99"] == pytest.approx(np.quantile(actions, 0.99, axis=0).tolist())
    assert stats["action"]["count"] == [15]
    pngs = [png for episode in episodes for png in episode.images["front"]]
    pixels = np.stack([decode_png(png) for png in pngs]) / 255
    assert np.shape(stats[IMAGE]["mean"]) == (3, 1, 1)
    assert np.ravel(stats[IMAGE]["mean"]) == pytest.approx(pixels.mean((0, 1, 2)))
    assert np.ravel(stats[IMAGE]["std"]) == pytest.approx(pixels.std((0, 1, 2)))


def test_keys_of_other_datasets_are_mapped(dataset: Path) -> None:
    read = LeRobotDataset(dataset, KeyMap(images={"primary": IMAGE}, state=None))
    frame = read[0]
    assert list(frame.observation.images) == ["primary"]
    assert frame.observation.state.shape == (0,)
    assert read.episode(0).state.shape == (4, 0)


def test_a_key_that_is_not_there_is_answered_with_those_that_are(dataset: Path) -> None:
    with pytest.raises(
        QvlaError, match=r"no wrist, actions; its keys are .*front, .*state, action"
    ):
        LeRobotDataset(dataset, KeyMap(images={"wrist": "wrist"}, action="actions"))
    with pytest.raises(QvlaError, match="timestamp: not an image but float32"):
        LeRobotDataset(dataset, KeyMap(images={"wrist": "timestamp"}))


def _edit_info(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        path = root / "meta/info.json"
        info = json.loads(path.read_text())
        change(info)
        path.write_text(json.dumps(info))

    return edit


def _as_video(info: dict[str, object]) -> None:
    features = info["features"]
    assert isinstance(features, dict)
    features[IMAGE]["dtype"] = "video"


def _truncate(name: str) -> Callable[[Path], None]:
    def truncate(root: Path) -> None:
        path = root / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return truncate


def _replace(name: str, column: str, values: list[object]) -> Callable[[Path], None]:
    def replace(root: Path) -> None:
        table = pq.read_table(root / name)
        at = table.column_names.index(column)
        array = pa.array(values, table.schema.field(column).type)
        pq.write_table(table.set_column(at, column, array), root / name)

    return replace


def _drop(name: str, column: str) -> Callable[[Path], None]:
    def drop(root: Path) -> None:
        pq.write_table(pq.read_table(root / name).drop_columns([column]), root / name)

    return drop


def _flip_bits(root: Path) -> None:
    path = root / DATA
    data = bytearray(path.read_bytes())
    data[200:1200] = bytes(255 - byte for byte in data[200:1200])
    path.write_bytes(data)


def _damaged_png(root: Path) -> None:
    png = encode_png(np.zeros((6, 8, 3), dtype=np.uint8))
    values = [{"bytes": png[:-30], "path": None}] * 15
    _replace(DATA, IMAGE, list(values))(root)


def _as_floats(root: Path) -> None:
    table = pq.read_table(root / DATA)
    missing = pa.array([float("nan")] * 15)
    pq.write_table(
        table.set_column(table.column_names.index("index"), "index", missing), root / DATA
    )


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no info": (lambda root: (root / "meta/info.json").unlink(), "info not found"),
    "half an info": (_truncate("meta/info.json"), "not valid JSON"),
    "info is a list": (lambda root: (root / "meta/info.json").write_text("[]"), "no JSON object"),
    "no features": (_edit_info(lambda info: info.pop("features")), r"lacks \['features'\]"),
    "older version": (
        _edit_info(lambda info: info.update(codebase_version="v1.6")),
        "is a LeRobotDataset v1.6, this reads v2.0, v2.1, v3.0; convert it",
    ),
    "newer version": (
        _edit_info(lambda info: info.update(codebase_version="v3.1")),
        "is a LeRobotDataset v3.1, this reads .*; write it with",
    ),
    "features of no kind": (_edit_info(lambda info: info.update(features=[])), "features must be"),
    "fps of no kind": (_edit_info(lambda info: info.update(fps="fast")), "fps must be a positive"),
    "videos": (
        _edit_info(_as_video),
        r"info.json says that .*front is video, but .* lacks \[.*write dtype image",
    ),
    "too few episodes": (
        _edit_info(lambda info: info.update(total_episodes=9)),
        r"counts \(9, 15\) episodes and frames, meta/episodes has \(3, 15\)",
    ),
    "no tasks": (lambda root: (root / "meta/tasks.parquet").unlink(), "missing: .*tasks.parquet"),
    "tasks without index": (_drop("meta/tasks.parquet", "task_index"), "needs the columns task"),
    "no episodes": (lambda root: (root / EPISODES).unlink(), "no episodes found"),
    "half the episodes": (_truncate(EPISODES), "truncated or damaged"),
    "episodes lack a column": (_drop(EPISODES, "dataset_to_index"), "lacks the columns"),
    "a gap between episodes": (
        _replace(EPISODES, "dataset_from_index", [0, 5, 9]),
        r"episode 1 spans 5\.\.9",
    ),
    "no data": (lambda root: (root / DATA).unlink(), "missing: .*file-000.parquet"),
    "half the data": (_truncate(DATA), "truncated or damaged"),
    "flipped bits": (_flip_bits, "truncated or damaged"),
    "data lacks the action": (_drop(DATA, "action"), r"lacks the columns \['action'\]; it has"),
    "data of another dataset": (
        _replace(DATA, "index", list(range(7, 22))),
        "data has no rows of index 0; the dataset is incomplete",
    ),
    "unknown task": (_replace(DATA, "task_index", [7] * 15), "task_index 7 is not in"),
    "a frame twice": (_replace(DATA, "index", [0, 0, *range(2, 15)]), "has 2 rows of index 0"),
    "no index": (_as_floats, "has no rows of index 0"),
    "rows of another episode": (
        _replace(DATA, "episode_index", [1] * 15),
        "episode 0, frame 0, column episode_index: the row is of episode 1",
    ),
    "no task": (
        _replace(DATA, "task_index", [None] * 15),
        "episode 0, frame 0, column task_index: a whole number .* got None",
    ),
    "damaged picture": (_damaged_png, "an image in the dataset is damaged"),
    "no picture": (_replace(DATA, IMAGE, [None] * 15), "holds no image bytes but NoneType"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(dataset: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    break_it(dataset)
    with pytest.raises(QvlaError, match=message):
        LeRobotDataset(dataset)[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_one_wrong_byte_is_noticed_or_harmless(
    original: Path, tmp_path: Path, data: st.DataObject
) -> None:
    root = Path(shutil.copytree(original, tmp_path / "dataset", dirs_exist_ok=True))
    content = bytearray((root / DATA).read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    (root / DATA).write_bytes(content)
    try:
        read = LeRobotDataset(root)
        episodes = [read.episode(i) for i in range(3)]
    except QvlaError:
        return
    assert all(
        same(episode, make_episode(i, 4 + i, episode.instruction))
        for i, episode in enumerate(episodes)
    )


def test_rows_that_are_missing_are_noticed(dataset: Path) -> None:
    table = pq.read_table(dataset / DATA)
    pq.write_table(table.slice(0, 11), dataset / DATA)
    read = LeRobotDataset(dataset)
    assert len(read.episode(1)) == 5
    with pytest.raises(ArtifactError, match=r"data has no rows of index 11"):
        read.episode(2)


def test_tasks_of_an_unnamed_pandas_index_are_read(dataset: Path) -> None:
    path = dataset / "meta/tasks.parquet"
    table = pq.read_table(path).rename_columns(["task_index", "__index_level_0__"])
    pq.write_table(table, path)
    assert LeRobotDataset(dataset).tasks == {0: "open", 1: "close"}


def test_episodes_of_a_dataset_are_alike(tmp_path: Path) -> None:
    with (
        pytest.raises(QvlaError, match=r"share cameras and shapes.*episode 1 has"),
        write_dataset(tmp_path / "dataset", FPS, "arm") as writer,
    ):
        writer.add(make_episode(0, 2))
        writer.add(make_episode(1, 2, dim=4))
    assert list(tmp_path.iterdir()) == []


def test_a_dataset_needs_an_episode(tmp_path: Path) -> None:
    with (
        pytest.raises(QvlaError, match="at least one episode"),
        write_dataset(tmp_path / "dataset", FPS, "arm"),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_an_episode_needs_a_picture_for_every_action() -> None:
    whole = make_episode(0, 3)
    with pytest.raises(QvlaError, match="'front': 2, 'state': 3, 'action': 3"):
        Episode("open", {"front": whole.images["front"][:2]}, whole.state, whole.action)
