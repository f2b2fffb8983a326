"""Recordings of formats that are not read are refused by the format's own name."""

import shutil
from pathlib import Path

import pytest
from small_datasets import write_small_dataset

from calibration.sources.lerobot import LeRobotDataset
from qvla_export.shared.errors import ArtifactError


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("episode_0.hdf5", "is HDF5, as LIBERO and ALOHA record, which is not read; write its"),
        ("episode_0000001.npz", "is CALVIN"),
        ("1.0.0/libero-train.tfrecord-00000-of-00016", "is RLDS, TFRecord files"),
        ("1.0.0/dataset_info.json", "is RLDS, metadata of tensorflow-datasets"),
        ("calib.jsonl", "of the official QVLA code, which is not read; give the dataset"),
        ("run.mcap", "is MCAP, a recording"),
        ("notes.txt", "info not found"),
    ],
)
def test_a_format_is_named(tmp_path: Path, file: str, message: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match=message):
        LeRobotDataset(tmp_path)
    with pytest.raises(ArtifactError, match=message):
        LeRobotDataset(path)


def test_a_folder_of_data_sets_names_one_of_them(tmp_path: Path) -> None:
    inner = tmp_path / "parent/organisation/name"
    shutil.copytree(write_small_dataset(tmp_path / "demos", [2]), inner)
    with pytest.raises(
        ArtifactError, match=f"holds datasets and is none; give one of them, {inner}"
    ):
        LeRobotDataset(tmp_path / "parent")
