"""Metadata of data sets as others publish it: found by the rows themselves, or refused."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changed_datasets import (
    DATA,
    EPISODES,
    FRAMES,
    NUMBER,
    STATE,
    drawn_from,
    set_column,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_datasets import make_episode

from calibration.calibration_set import describe, sample_dataset
from calibration.sources.base import BadFrame
from calibration.sources.lerobot import LeRobotDataset
from calibration.sources.lerobot_writer import write_dataset
from qvla_export.pipeline.data_source import ColumnOptions, open_dataset
from qvla_export.shared.errors import ArtifactError, QvlaError


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
    # As one leaves it that writes no places at all.
    places = ["data/chunk_index", "data/file_index"]
    pq.write_table(pq.read_table(right / EPISODES).drop_columns(places), right / EPISODES)
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
