"""Recordings that were cut, changed or written by others are read as far as they are sound."""

import base64
import dataclasses
import itertools
import json
import time
from pathlib import Path

import lz4.frame
import numpy as np
import pytest
import zstandard
from echo_policy import OFT
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mcap.records import Channel, Chunk, DataEnd, Message, Metadata, Schema
from mcap.stream_reader import StreamReader
from mcap.writer import CompressionType, Writer
from small_recordings import recorded, same, served

from jetson.board import read_board_state
from jetson.recording.reader import Recording
from jetson.recording.schemas import Images
from jetson.recording.writer import McapRecorder, encode_image
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.mcap_records import unpack_chunk
from qvla_export.shared.recorded_messages import read_picture


def test_a_recording_cut_anywhere_replays_up_to_the_cut(tmp_path: Path) -> None:
    path = tmp_path / "whole.mcap"
    with McapRecorder(path, OFT, read_board_state, "serve") as writing:
        for index in range(4):
            writing.on_request(served(index))
            while writing.written <= index:
                time.sleep(0.001)
            writing._files.flush({})  # a chunk each, as a second each would be
    whole, content = list(Recording(path).moments()), path.read_bytes()
    cut, lengths = tmp_path / "cut.mcap", []
    for size in np.linspace(0, len(content), 60).astype(int).tolist():
        cut.write_bytes(content[:size])
        try:
            moments = list(Recording(cut).moments())
        except ArtifactError as error:
            assert "is not a recording" in str(error) and size < 4096, "only the head is needed"
            continue
        lengths.append(len(moments))
        assert [m.observation.instruction for m in moments] == [
            m.observation.instruction for m in whole[: len(moments)]
        ]
    assert lengths == sorted(lengths) and {0, 1, 2, 3, 4} <= {*lengths}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    return recorded(folder / "run.mcap", [served(i, 8) for i in range(3)]).path.read_bytes()


@given(st.data())
@examples(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_files_are_read_up_to_the_damage(
    whole: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    damaged = bytearray(whole[: data.draw(st.integers(0, len(whole)))])
    for _ in range(data.draw(st.integers(0, 3))):
        if damaged:
            at = data.draw(st.integers(0, len(damaged) - 1))
            damaged[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "damaged.mcap"
    path.write_bytes(damaged)
    try:
        moments = list(Recording(path).moments())
    except ArtifactError as error:
        assert str(path) in str(error)
        return
    assert len(moments) <= 3
    for index, moment in enumerate(moments):
        same(moment, served(index, 8))


@pytest.mark.parametrize(
    "way",
    ["lz4", "lz4 in several frames", "zstd without content size", "zstd in several frames"],
)
def test_chunks_of_other_writers_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """As the official writer (lz4) and Go's tools (zstd as a stream) compress."""
    path, other = tmp_path / "run.mcap", tmp_path / "other.mcap"
    recorded(path, [served(index) for index in range(4)])
    is_lz4 = way.startswith("lz4")
    sizeless = zstandard.ZstdCompressor(write_content_size=False)
    plain = lz4.frame.compress if is_lz4 else sizeless.compress

    def compress(data: bytes) -> bytes:
        cuts = (0, len(data) // 3, len(data)) if "several" in way else (0, len(data))
        return b"".join(plain(data[a:b]) for a, b in itertools.pairwise(cuts))

    place = "lz4.frame" if is_lz4 else "zstandard"
    monkeypatch.setattr(f"mcap.writer.{place}.compress", compress)
    kind = CompressionType.LZ4 if is_lz4 else CompressionType.ZSTD
    with path.open("rb") as source, other.open("wb") as target:
        writer = Writer(target, chunk_size=20_000, compression=kind)
        writer.start()
        for record in StreamReader(source).records:
            if isinstance(record, Metadata):
                writer.add_metadata(record.name, record.metadata)
            elif isinstance(record, Schema):
                writer.register_schema(record.name, record.encoding, record.data)
            elif isinstance(record, Channel):
                writer.register_channel(record.topic, record.message_encoding, record.schema_id)
            elif isinstance(record, Message):
                writer.add_message(
                    record.channel_id, record.log_time, record.data, record.publish_time
                )
            elif isinstance(record, DataEnd):
                break
        writer.finish()
    moments = list(Recording(other).moments())
    assert len(moments) == 4
    for index, moment in enumerate(moments):
        same(moment, served(index))


def test_a_length_inside_a_record_is_not_believed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "run.mcap"
    recorded(path, [served(0)])
    data = path.read_bytes()
    # The compression's name, and the length of the chunk's bytes after it.
    at = data.index(b"zstd") + 4
    path.write_bytes(data[:at] + (1 << 34).to_bytes(8, "little") + data[at + 8 :])
    assert list(Recording(path).moments()) == []
    assert "a field of 17179869184 bytes" in caplog.text


@pytest.mark.parametrize(("form", "height", "width"), [("png", 1, 4000), ("jpeg", 8200, 4000)])
def test_recorded_pictures_have_the_bounds_of_sent_ones(
    form: Images, height: int, width: int
) -> None:
    data = encode_image(np.zeros((height, width, 3), np.uint8), form)
    message = {"format": form, "data": base64.b64encode(data).decode()}
    with pytest.raises(ValueError, match=f"got {width} x {height}"):
        read_picture(json.dumps(message).encode())


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
def test_a_chunk_that_unpacks_to_more_than_it_says_is_not_unpacked(kind: str) -> None:
    data = bytes(1 << 20)
    squeeze = zstandard.compress if kind == "zstd" else lz4.frame.compress
    chunk = Chunk(kind, squeeze(data), 0, 0, 0, 100)
    with pytest.raises(ValueError, match="of 101 bytes or more where 100 are announced"):
        unpack_chunk(chunk)
    with pytest.raises(ValueError, match="at most 268435456 are read"):
        unpack_chunk(dataclasses.replace(chunk, uncompressed_size=1 << 40))
