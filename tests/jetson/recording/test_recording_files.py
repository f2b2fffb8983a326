"""A long recording: its files are bounded, complete, and read as one."""

import errno
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from echo_policy import OFT, EchoPolicy
from mcap.reader import make_reader
from mcap.summary import Summary
from mcap.writer import Writer
from small_recordings import recorder, served

from calibration.sources.mcap_recordings import McapRecordings
from jetson.errors import RefusedSetting
from jetson.recording import mcap_files, writer
from jetson.recording.mcap_files import McapFiles
from jetson.recording.reader import Recording
from jetson.recording.replay import replay_recording
from jetson.recording.replay_lines import replay_lines
from jetson.recording.schemas import BOARD
from qvla_export.shared.mcap_records import recording_files
from qvla_export.shared.recorded_messages import FORMAT

_ABOUT = {"format": FORMAT}
_MOST = 2


@pytest.fixture(autouse=True)
def short_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcap_files, "_FILE_CHUNKS", _MOST)
    monkeypatch.setattr(writer, "_FLUSH_S", 0.001)


def stored_bytes(path: Path) -> int:
    """Return how much of a recording is in its files."""
    return sum(file.stat().st_size for file in path.parent.glob("*.mcap"))


def record(path: Path, count: int = 8) -> list[Path]:
    """Each event a chunk of its own, and `_MOST` of them a file."""
    with recorder(path) as writing:
        for index in range(count):
            before = stored_bytes(path)
            writing.on_request(served(index))
            while writing.written <= index or stored_bytes(path) == before:
                time.sleep(0.001)
    return list(recording_files(path))


def summary(path: Path) -> Summary:
    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True)
        assert all(message.data for _, _, message in reader.iter_messages())
        told = reader.get_summary()
    assert told is not None
    return told


def instructions(path: Path) -> list[str]:
    return [moment.observation.instruction for moment in Recording(path).moments()]


def boards(path: Path, about: dict[str, str] = _ABOUT) -> Iterator[McapFiles]:
    """Files that take a message and a chunk at every step."""
    files = McapFiles(path, about)
    for index in range(1000):
        files.write(BOARD, BOARD, index, {"model": "none"})
        files.flush({})
        yield files


def test_a_long_recording_is_read_as_one(tmp_path: Path) -> None:
    paths = record(tmp_path / "run.mcap")
    assert len(paths) >= 3
    assert [path.name for path in paths[:3]] == ["run.mcap", "run_0002.mcap", "run_0003.mcap"]
    assert paths == sorted(tmp_path.iterdir())
    recording = Recording(paths[0])
    moments = list(recording.moments())
    assert len(moments) == 8
    for index, moment in enumerate(moments):
        expected = served(index).observation
        assert expected is not None and moment.observation.instruction == expected.instruction
        np.testing.assert_array_equal(moment.observation.images["front"], expected.images["front"])
    assert recording.counts == {"written": 8, "dropped": 0} and recording.ended == "complete"
    assert sum(McapRecordings(paths[0]).episode_lengths) == 8


def test_each_file_is_complete_and_bounded(tmp_path: Path) -> None:
    paths = record(tmp_path / "run.mcap")
    for path in paths:
        assert len(summary(path).chunk_indexes) <= _MOST
    # Read alone, a file is what it holds and what continues it.
    whole = instructions(paths[0])
    for path, following in itertools.pairwise(paths):
        held = len(instructions(path)) - len(instructions(following))
        assert 0 <= held <= _MOST and instructions(path) == whole[-len(instructions(path)) :]


def test_a_file_that_is_missing_is_said(tmp_path: Path) -> None:
    paths = record(tmp_path / "run.mcap")
    whole = instructions(paths[0])
    paths[1].unlink()
    recording = Recording(paths[0])
    found = [moment.observation.instruction for moment in recording.moments()]
    assert 0 < len(found) < 8 and found == whole[: len(found)]
    assert recording.ended == "continues in run_0002.mcap"
    lines = list(replay_lines(replay_recording(Recording(paths[0]), EchoPolicy(OFT))))
    assert "not all was recorded, or is here: continues in run_0002.mcap" in lines


def test_files_of_other_recordings_are_not_taken_for_its_own(tmp_path: Path) -> None:
    paths = record(tmp_path / "run.mcap")
    (tmp_path / "other").mkdir()
    others = record(tmp_path / "other" / "run.mcap")
    others[1].replace(paths[1])
    assert list(recording_files(paths[0])) == paths[:1]
    # Nor those after it where its own name is gone.
    moved = paths[0].replace(tmp_path / "renamed.mcap")
    assert list(recording_files(moved)) == [moved]
    renamed = others[2].replace(tmp_path / "last.mcap")
    assert list(recording_files(renamed)) == [renamed]


def test_a_damaged_file_hides_only_its_own_rest(tmp_path: Path) -> None:
    paths = record(tmp_path / "run.mcap")
    after = instructions(paths[1])
    paths[0].write_bytes(paths[0].read_bytes()[: paths[0].stat().st_size // 2])
    assert instructions(paths[0])[-len(after) :] == after


def test_a_name_that_is_taken_is_refused_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "run_0002.mcap").write_bytes(b"mine")
    with pytest.raises(RefusedSetting, match=r"run_0002.mcap exists; recordings are not over"):
        recorder(tmp_path / "run.mcap")
    assert not (tmp_path / "run.mcap").exists()


def test_a_name_that_is_taken_later_ends_the_recording_and_is_said(tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    steps = boards(path)
    files = next(steps)
    taken = tmp_path / "run_0002.mcap"
    taken.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="run_0002"):
        next(steps)
    # As the recorder does with a failure.
    files.end("FileExistsError", {})
    files.close()
    assert taken.read_bytes() == b"mine" and len(summary(path).chunk_indexes) == _MOST


def test_without_descriptors_the_file_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise OSError(errno.EMFILE, "Too many open files")

    steps = boards(tmp_path / "run.mcap")
    next(steps)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        for _ in range(5):
            next(steps)
    files = next(steps)
    files.end("complete", {})
    files.close()
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["run.mcap", "run_0002.mcap"]
    assert len(summary(tmp_path / "run.mcap").chunk_indexes) == 7


@pytest.mark.parametrize("step", [0, 1])
def test_a_disk_that_is_full_leaves_no_empty_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    steps = boards(tmp_path / "run.mcap")
    for _ in range(step):
        next(steps)
    monkeypatch.setattr(Writer, "start", refuse)
    with pytest.raises(RefusedSetting if step == 0 else OSError, match="No space left"):
        next(steps)
    assert len(list(tmp_path.iterdir())) == step


@pytest.mark.parametrize("number", ["0", "-1", "x", "9" * 5000, ""])
def test_a_place_that_is_none_is_no_chain(tmp_path: Path, number: str) -> None:
    path = tmp_path / "run.mcap"
    with path.open("wb") as file:
        written = Writer(file)
        written.start()
        written.add_metadata("qvla", {**_ABOUT, "recording": "a", "file": number})
        written.finish()
    assert list(recording_files(path)) == [path]


def test_the_index_in_memory_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mcap_files, "_FILE_CHUNKS", 16)
    steps = boards(tmp_path / "run.mcap")
    for _ in range(100):
        files = next(steps)
    files.end("complete", {})
    files.close()
    paths = list(recording_files(tmp_path / "run.mcap"))
    assert [len(summary(path).chunk_indexes) for path in paths] == [16] * 6 + [4]
