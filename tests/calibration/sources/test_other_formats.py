"""Where a LeRobotDataset is needed, recordings of other formats are refused by name."""

import shutil
from pathlib import Path

import pytest
from small_datasets import write_small_dataset

from calibration.sources.formats import open_source
from calibration.sources.lerobot import LeRobotDataset
from qvla_export.shared.errors import ArtifactError


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("episode_0.hdf5", "is HDF5, where a LeRobotDataset is needed; qvla calibrate"),
        ("episode_0000001.npz", "is CALVIN"),
        ("1.0.0/libero-train.tfrecord-00000-of-00016", "is RLDS"),
        ("1.0.0/dataset_info.json", "is RLDS"),
        ("calib.jsonl", "is list of pictures"),
        ("run.mcap", "is MCAP"),
        ("notes.bag", "is a ROS 1 bag, which is not read"),
        ("data.zarr/.zgroup", "is a Zarr store"),
        (".zgroup", "is a Zarr store"),
        ("data-00000-of-00001.arrow", "is Arrow files of the datasets library"),
        ("1.0.0/x-train.array_record-00000-of-00001", "is RLDS in array_record files"),
        ("000.tar", "is a WebDataset"),
        ("demo.pickle", "is a pickle, which is not read"),
        ("demos.tar.gz", r"is an archive \(unpack it\), which is not read"),
        ("picture.png", "is no recording that is read"),
        ("notes.txt", "info not found|is no recording that is read"),
    ],
)
def test_a_format_is_named(tmp_path: Path, file: str, message: str) -> None:
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"")
    if file.endswith(".arrow"):  # which comes with a file that RLDS has, too
        (tmp_path / "dataset_info.json").write_text("{}")
    for place in (tmp_path, path):
        with pytest.raises(ArtifactError, match=message):
            LeRobotDataset(place)
        # Empty files of formats that are read are damaged.
        with pytest.raises(ArtifactError):
            open_source(place)


def test_a_folder_of_data_sets_names_one_of_them(tmp_path: Path) -> None:
    inner = tmp_path / "parent/organisation/name"
    shutil.copytree(write_small_dataset(tmp_path / "demos", [2]), inner)
    for opener in (LeRobotDataset, open_source):
        with pytest.raises(
            ArtifactError, match=f"holds datasets and is none; give one of them, {inner}"
        ):
            opener(tmp_path / "parent")
