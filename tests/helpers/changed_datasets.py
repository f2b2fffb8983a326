"""Eight small episodes as a LeRobotDataset, and ways to change what is stored of them."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from small_datasets import write_small_dataset

from calibration.calibration_set import CalibrationSet, sample_dataset
from calibration.sources.lerobot import LeRobotDataset

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
IMAGE, STATE = "observation.images.image", "observation.state"
FRAMES, NUMBER = 5, 8


def write_brought(root: Path) -> Path:
    """Write eight episodes of five frames."""
    return write_small_dataset(root, [FRAMES] * NUMBER)


def drawn_from(dataset: LeRobotDataset, **options: Any) -> CalibrationSet:
    """Draw eight observations and as many held out."""
    return sample_dataset(dataset, 8, 8, 0, **options)


def set_column(path: Path, name: str, values: Sequence[Any], kind: Any = None) -> None:
    """Replace a column of a parquet file, or add one."""
    table = pq.read_table(path)
    array = pa.array(values, kind)
    if name in table.column_names:
        table = table.set_column(table.column_names.index(name), name, array)
    else:
        table = table.append_column(name, array)
    pq.write_table(table, path)


def edit_info(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change `meta/info.json` in place."""
    path = root / "meta/info.json"
    info = json.loads(path.read_text())
    change(info)
    path.write_text(json.dumps(info))


def edit_features(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the features of `meta/info.json` in place."""
    edit_info(root, lambda info: change(info["features"]))


def rename(root: Path, names: dict[str, str]) -> None:
    """Give columns other names, in the rows and in the features."""
    table = pq.read_table(root / DATA)
    pq.write_table(table.rename_columns([names.get(n, n) for n in table.column_names]), root / DATA)
    edit_features(
        root, lambda f: f.update({new: f.pop(old) for old, new in names.items() if old in f})
    )
