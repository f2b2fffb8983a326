"""Data sets with video that are wrong anywhere: read, or refused; never a traceback."""

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import DATA

from calibration.sources.lerobot import LeRobotDataset
from qvla_export.shared.errors import QvlaError

SETS = ("av1_v30", "h264_v30", "mixed_v21")
COUNTS = [50, pytest.param(2000, marks=pytest.mark.slow)]
ODD = (None, math.nan, math.inf, -1, 0, 1, 2**40, 1e300, "", "x", "../x", [], {}, [1], True)
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def reads_or_refuses(root: Path) -> bool:
    """Return whether the first frame of two episodes is read, each of its camera's size."""
    try:
        dataset = LeRobotDataset(root)
        frames = [dataset.frame(episode, 4) for episode in (0, 1)]
        dataset.expect([(1, 2), (0, 1)])
        frames += [dataset.frame(0, 1), dataset.frame(1, 2)]
    except QvlaError:
        return False
    sizes = {"top": (48, 64, 3), "wrist": (40, 56, 3)}
    assert all(
        image.shape == sizes[camera]
        for frame in frames
        for camera, image in frame.observation.images.items()
    )
    return True


def copy_of(name: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(DATA / "videos" / name, tmp_path / name))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", SETS)
def test_any_bytes_of_a_video(name: str, count: int, tmp_path: Path) -> None:
    root = copy_of(name, tmp_path)
    video = sorted(root.glob("videos/**/*.mp4"))[0]
    intact = video.read_bytes()
    chance = random.Random(count)
    # The tables behind the pictures say what is where.
    tables = intact.index(b"moov")
    outcomes = set()
    for _ in range(count):
        data = bytearray(intact)
        for _ in range(chance.choice((1, 2, 4, 8))):
            first = chance.choice((0, tables))
            data[chance.randrange(first, len(data))] = chance.choice((0, 127, 128, 255))
        if chance.random() < 0.2:
            start = chance.randrange(len(data))
            del data[start : start + chance.choice((1, 50, len(data)))]
        video.write_bytes(data)
        outcomes.add(reads_or_refuses(root))
    assert outcomes == {True, False}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if path:
        yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["av1_v30", "mixed_v21"])
def test_any_value_of_info(name: str, count: int, tmp_path: Path) -> None:
    root = copy_of(name, tmp_path)
    path = root / "meta/info.json"
    intact = path.read_text()
    chance = random.Random(count)
    outcomes = set()
    for _ in range(count):
        info = json.loads(intact)
        for _ in range(chance.choice((1, 1, 2))):
            place = chance.choice(list(places(info)))
            holder = info
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = chance.choice(ODD)
        path.write_text(json.dumps(info))
        outcomes.add(reads_or_refuses(root))
    assert outcomes == {True, False}


@pytest.mark.parametrize("count", COUNTS)
def test_any_value_of_the_episodes_table(count: int, tmp_path: Path) -> None:
    root = copy_of("av1_v30", tmp_path)
    intact = pq.read_table(root / EPISODES)
    chance = random.Random(count)
    outcomes = set()
    for _ in range(count):
        column = chance.choice(intact.column_names)
        values: list[Any] = intact[column].to_pylist()
        odd = chance.choice(ODD)
        kind: Any = None
        if chance.random() < 0.7 and (odd is None or isinstance(odd, int | float)):
            values[chance.randrange(2)], kind = odd, pa.float64()
        else:
            values = [odd] * len(values)
        try:
            array = pa.array(values, kind)
            table = intact.set_column(intact.column_names.index(column), column, array)
            pq.write_table(table, root / EPISODES)
        except (pa.ArrowException, TypeError, OverflowError):
            continue  # no parquet file can say that
        outcomes.add(reads_or_refuses(root))
    assert outcomes == {True, False}
