"""Recordings as they come over: pointers for files, files of macOS, copies, absent shards."""

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_datasets import write_small_dataset
from small_records import droid_episode, write_records
from small_sources import SOURCES, SmallSource, write_list, write_source

from calibration.sources.formats import open_source
from qvla_export.pipeline.policy_source import open_checkpoint
from qvla_export.shared.errors import ArtifactError, QvlaError

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
# What macOS writes beside a file that it copies to another file system.
APPLE_DOUBLE = b"\0\5\x16\7\0\2\0\0Mac OS X        "
DATA = "data/chunk-000/file-000.parquet"


def read_all(source: SmallSource) -> list[Any]:
    opened = open_source(source.root, source.keys)
    try:
        frames = [
            opened.frame(episode, frame)
            for episode, length in enumerate(opened.episode_lengths)
            for frame in range(length)
        ]
    finally:
        opened.close()
    return [
        (
            frame.observation.instruction,
            frame.observation.state.tolist(),
            frame.action.tolist(),
            {name: image.tobytes() for name, image in frame.observation.images.items()},
        )
        for frame in frames
    ]


@pytest.mark.parametrize("name", [name for name in SOURCES if name != "calvin-whole"])
def test_a_pointer_of_git_lfs_is_named_with_the_command(tmp_path: Path, name: str) -> None:
    source = write_source(name, tmp_path / "recording")
    read = read_all(source)
    told = 0
    for path in sorted(path for path in source.root.rglob("*") if path.is_file()):
        content = path.read_bytes()
        path.write_text(POINTER)
        try:
            assert read_all(source) == read  # nothing reads it
        except QvlaError as error:
            assert f"{path} is not the file but a pointer" in str(error), error
            assert "git lfs pull" in str(error)
            told += 1
        path.write_bytes(content)
    assert told


def test_a_checkpoint_s_pointers_are_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    read = ("config.json", "tokenizer.json", "dataset_statistics.json")
    for path in [*map(root.joinpath, read), *root.glob("*.safetensors"), *root.glob("*.pt")]:
        content = path.read_bytes()
        path.write_text(POINTER)
        with pytest.raises(QvlaError, match=f"{path} is not the file but a pointer of Git LFS"):
            open_checkpoint(root)
        path.write_bytes(content)


@pytest.mark.parametrize("name", SOURCES)
def test_what_macos_leaves_is_not_read(tmp_path: Path, name: str) -> None:
    source = write_source(name, tmp_path / "recording")
    read = read_all(source)
    for path in sorted(path for path in source.root.rglob("*") if path.is_file()):
        (path.parent / f"._{path.name}").write_bytes(APPLE_DOUBLE)
    assert read_all(source) == read


def test_a_file_that_is_there_twice_is_named(tmp_path: Path) -> None:
    root = write_small_dataset(tmp_path / "data set", [3, 3], side=8)
    shutil.copy(root / DATA, root / "data/chunk-000/file-000 (1).parquet")
    with pytest.raises(
        ArtifactError, match=r"2 rows of index 0, in .*file-000 \(1\).parquet, .*file-000.parquet; "
    ):
        open_source(root).frame(0, 0)


@pytest.mark.parametrize("part", ["meta", "meta/info.json", "data", "data/chunk-000", DATA])
def test_a_part_of_a_dataset_is_answered_with_the_whole(tmp_path: Path, part: str) -> None:
    root = write_small_dataset(tmp_path / "whole", [3], side=8)
    with pytest.raises(ArtifactError, match=f"is a part of the LeRobotDataset {root}; give that"):
        open_source(root / part)


def test_shards_that_are_absent_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    root = write_records(tmp_path, [droid_episode()], "train.tfrecord-00001-of-00003")
    assert open_source(root).episode_lengths == (3,)
    assert f"{root} is not whole, what is there is read: files 1 of 3 of train" in caplog.text
    caplog.clear()
    for number in (0, 2):
        write_records(root, [droid_episode()], f"train.tfrecord-{number:05d}-of-00003")
    assert open_source(root).episode_lengths == (3, 3, 3) and not caplog.text


def test_paths_may_be_absolute_but_not_of_windows(tmp_path: Path) -> None:
    source = SmallSource(*_listed(tmp_path, "front0.png", str(tmp_path / "list/front0.png")))
    assert len(read_all(source)) == 6
    shutil.rmtree(source.root)
    windows = SmallSource(*_listed(tmp_path, "front0.png", r"there\\front0.png"))
    with pytest.raises(ArtifactError, match="as Windows writes paths; write / between folders"):
        read_all(windows)


def _listed(folder: Path, old: str, new: str) -> tuple[Any, ...]:
    root = write_list(folder / "list")
    text = (root / "frames.json").read_text()
    (root / "frames.json").write_text(text.replace(f'"{old}"', f'"{new}"'))
    return root, None, ()
