"""Recordings: what was seen and done comes back, also when the recorder is killed."""

import base64
import dataclasses
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lz4.frame
import numpy as np
import pytest
import zstandard
from command_runs import qvla
from control_doubles import Bench
from echo_policy import OFT, EchoPolicy, oft_fields, post
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap.records import Channel, Chunk, DataEnd, Message, Metadata, Schema
from mcap.stream_reader import StreamReader
from mcap.writer import CompressionType, Writer
from places import HELPERS, ROOT
from small_recordings import recorder, served

from jetson.board import read_board_state
from jetson.control.loop_state import LoopState
from jetson.errors import PolicyFailure, RefusedSetting
from jetson.recording.queue import DropQueue, QueuedWrite
from jetson.recording.reader import Moment, Recording
from jetson.recording.replay import replay_recording
from jetson.recording.schemas import Images
from jetson.recording.writer import McapRecorder, encode_image
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.request_observer import ServedRequest
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactError, ArtifactMismatch
from qvla_export.shared.mcap_records import unpack_chunk
from qvla_export.shared.observation import Observation
from qvla_export.shared.recorded_messages import read_picture


def recorded(path: Path, events: list[ServedRequest], **options: Any) -> Recording:
    with recorder(path, **options) as writing:
        for event in events:
            writing.on_request(event)
    return Recording(path)


def same(moment: Moment, event: ServedRequest) -> None:
    assert event.observation is not None and event.chunk is not None and moment.chunk is not None
    assert moment.observation.instruction == event.observation.instruction
    np.testing.assert_array_equal(moment.observation.state, event.observation.state)
    assert list(moment.observation.images) == list(event.observation.images)
    for name, image in event.observation.images.items():
        np.testing.assert_array_equal(moment.observation.images[name], image)
    np.testing.assert_array_equal(moment.chunk.actions, event.chunk.actions)
    np.testing.assert_array_equal(moment.chunk.normalized, event.chunk.normalized)
    assert moment.chunk.timing_ms == event.timing_ms


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    events = [served(index) for index in range(20)]
    recording = recorded(tmp_path / "new" / "run.mcap", events)
    moments = list(recording.moments())
    assert len(moments) == 20 and recording.counts == {"written": 20, "dropped": 0}
    for moment, event in zip(moments, events, strict=True):
        same(moment, event)
    assert recording.contract == OFT and recording.lossless
    assert [o.instruction for o in recording.observations(3)] == [
        event.observation.instruction for event in events[:3] if event.observation
    ]


def test_other_tools_read_it(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.mcap", [served(0), served(1)]).path
    with path.open("rb") as file:
        reader = make_reader(file, validate_crcs=True)
        summary = reader.get_summary()
        found = [(s, c, json.loads(m.data)) for s, c, m in reader.iter_messages()]
    assert summary is not None and summary.statistics is not None
    assert {c.topic for _, c, _ in found} == {
        "/camera/front", "/camera/hand", "/observation", "/action", "/board",
    }  # fmt: skip
    for schema, channel, value in found:
        assert schema is not None and schema.encoding == "jsonschema"
        assert channel.message_encoding == "json"
        described = json.loads(schema.data)
        assert {*described["required"]} <= {*value}
        assert channel.topic == "/board" or {*value} == {*described["properties"]}


def test_jpeg_is_smaller_and_says_so(tmp_path: Path) -> None:
    smooth = np.add.outer(np.arange(96), np.arange(96))[..., None].repeat(3, 2).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 9, smooth.shape, np.uint8)
    observation = Observation({"front": smooth + noise, "hand": smooth + noise[::-1]}, "push")
    event = ServedRequest(observation, served(0).chunk, {"total": 1.0})
    exact = recorded(tmp_path / "png.mcap", [event] * 8)
    lossy = recorded(tmp_path / "jpeg.mcap", [event] * 8, images="jpeg")
    assert lossy.path.stat().st_size < exact.path.stat().st_size / 2
    assert exact.lossless and not lossy.lossless
    seen = next(lossy.moments()).observation.images["front"].astype(int)
    assert 0 < np.abs(seen - observation.images["front"]).mean() < 3


def test_refusals_are_recorded_and_unreadable_requests_are_not(tmp_path: Path) -> None:
    failed = ServedRequest(served(0).observation, None, {"total": 1.0}, PolicyFailure("on fire"))
    unread = ServedRequest(None, None, {}, PolicyFailure("stranger"))
    recording = recorded(tmp_path / "run.mcap", [failed, unread, served(1)])
    first, second = recording.moments()
    assert (first.chunk, first.error) == (None, "on fire") and second.error == ""
    assert len(recording.observations()) == 1


def test_recordings_are_not_overwritten(tmp_path: Path) -> None:
    path = recorded(tmp_path / "run.mcap", [served(0)]).path
    before = path.read_bytes()
    with pytest.raises(RefusedSetting, match="not overwritten"):
        recorder(path)
    assert path.read_bytes() == before
    with pytest.raises(RefusedSetting, match="png"):
        recorder(tmp_path / "other.mcap", images="gif")


def test_a_disk_that_does_not_follow_drops_and_never_blocks(tmp_path: Path) -> None:
    gate, asked = threading.Event(), threading.Event()

    def stuck() -> Any:
        asked.set()
        gate.wait(20)
        return read_board_state()

    size = 2 * 24 * 25 * 3 + 1024
    writing = McapRecorder(tmp_path / "run.mcap", OFT, stuck, "serve", "png", 5 * size)
    assert asked.wait(20)  # the writer waits; what comes now waits for it
    for index in range(12):
        writing.on_request(served(index))
    assert writing.dropped == 7
    gate.set()
    writing.close()
    recording = Recording(writing.path)
    assert [m.observation.instruction for m in recording.moments()] == [
        f"push {index} é" for index in range(5)
    ]
    assert recording.counts == {"written": 5, "dropped": 7}


def failing_recorder(path: Path) -> tuple[McapRecorder, threading.Event]:
    """A recorder whose disk is full at the first board sample, once the event is set."""
    gate = threading.Event()

    def full() -> Any:
        gate.wait(20)
        raise OSError(28, "No space left on device")

    return McapRecorder(path, OFT, full, "serve"), gate


def test_a_recorder_that_died_says_so_and_counts_what_is_lost(tmp_path: Path) -> None:
    writing, gate = failing_recorder(tmp_path / "run.mcap")
    assert writing.failure is None
    for index in range(3):
        writing.on_request(served(index))
    gate.set()
    writing._thread.join(20)
    for index in range(4):
        writing.on_request(served(index))
    assert writing.dropped == 7 and writing.written == 0
    assert writing.failure is not None and "No space left" in writing.failure
    writing.close()
    recording = Recording(writing.path)
    assert list(recording.moments()) == []
    assert recording.ended is not None and "No space left" in recording.ended
    assert recording.counts == {"written": 0, "dropped": 3}


def test_the_control_loop_hears_of_it_once(tmp_path: Path) -> None:
    writing, gate = failing_recorder(tmp_path / "run.mcap")
    gate.set()
    writing._thread.join(20)
    bench = Bench()
    bench.loop._recorder = writing
    bench.ticks(20)
    assert bench.loop.counters.faults == 1 and writing.dropped > 10
    assert bench.loop.state is LoopState.RUNNING


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


def test_a_recording_that_ended_well_says_so(tmp_path: Path) -> None:
    recording = recorded(tmp_path / "run.mcap", [served(0)])
    assert recording.ended is None, "not known before it was read"
    list(recording.moments())
    assert recording.ended == "complete"


@given(st.lists(st.one_of(st.integers(1, 60), st.none()), max_size=40), st.integers(1, 100))
def test_the_queue_keeps_order_and_its_bound(steps: list[int | None], most: int) -> None:
    queue, model, dropped = DropQueue(most), [], 0
    for step in steps:
        if step is None:
            taken = queue.take(0)
            assert taken is (model.pop(0) if model else None)
            continue
        event = QueuedWrite(lambda: None, step)
        fits = sum(waiting.nbytes for waiting in model) + step <= most
        assert queue.put(event) is fits
        model += [event] * fits
        dropped += not fits
    assert queue.dropped == dropped
    queue.close()
    assert not queue.put(QueuedWrite(lambda: None, 0))
    assert queue.is_done is (not model)
    assert [queue.take(0) for _ in model] == model
    assert queue.is_done


_RECORD_UNTIL_KILLED = """
import sys, time
from pathlib import Path
from small_recordings import recorder, served
writing = recorder(Path(sys.argv[1]))
for index in range(100000):
    writing.on_request(served(index))
    time.sleep(0.002)
    print(index, flush=True)
"""


def test_a_killed_recorder_leaves_a_readable_file(tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    command = [sys.executable, "-c", _RECORD_UNTIL_KILLED, str(path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{HELPERS}"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        told = 0
        for line in process.stdout:
            told = int(line)
            # The size does not say that a chunk is complete: it is written in parts.
            if told % 100 == 99 and any(True for _ in Recording(path).moments()):
                break
        process.send_signal(signal.SIGKILL)
    recording = Recording(path)
    moments = list(recording.moments())
    assert recording.counts is None
    assert 0 < len(moments) <= told + 2
    for index, moment in enumerate(moments):
        same(moment, served(index))


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


@pytest.mark.parametrize("content", [b"", b"not a recording", b"\x89MCAP0\r\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.mcap"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="qvla serve --record"):
        Recording(path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Recording(tmp_path / "missing.mcap")


def test_a_served_run_replays_without_drift(tmp_path: Path) -> None:
    path = tmp_path / "run.mcap"
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, record=path)) as url:
        for index in range(6):
            image = np.full((12, 10, 3), 20 * index, np.uint8)
            assert post(url, oft_fields(full_image=image)).status_code == 200
        assert post(url, oft_fields(instruction="fail")).status_code == 500
    done = replay_recording(Recording(path), EchoPolicy(OFT))
    assert done.drift.observations == 6 and done.drift.worst == 0
    assert done.lossless and done.dropped == 0 and done.has_times
    assert replay_recording(Recording(path), EchoPolicy(OFT), limit=2).drift.observations == 2

    class Wrong(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            actions = super().infer(observation).actions.copy()
            actions[3, 2] += 0.5 * (observation.images["front"][0, 0, 0] == 80)
            return ActionChunk(actions, actions, {})

    other = replay_recording(Recording(path), Wrong(OFT))
    assert other.worst == 4 and not other.has_times
    np.testing.assert_allclose(other.drift.max_physical, [0, 0, 0.5, 0, 0, 0, 0])


def test_a_policy_of_another_robot_is_refused(tmp_path: Path) -> None:
    from dataclasses import replace

    recording = recorded(tmp_path / "run.mcap", [served(0)])
    with pytest.raises(ArtifactMismatch, match=r"\[4, 7\].*\[8, 7\]"):
        replay_recording(recording, EchoPolicy(replace(OFT, horizon=8)))


def test_commands_record_profile_and_replay(
    tmp_path: Path, tiny_checkpoint: Path, tiny_observations: Callable[..., list[Observation]]
) -> None:
    from qvla_export.policies.oft.policy import load_oft_policy

    policy, path = load_oft_policy(tiny_checkpoint), tmp_path / "run.mcap"
    with open_server(policy, ServerSettings(port=0, record=path)) as url:
        for seen in tiny_observations(3):
            fields = oft_fields(
                full_image=seen.images["image"], wrist_image=None,
                state=seen.state, instruction=seen.instruction,
            )  # fmt: skip
            assert post(url, fields).status_code == 200
    profiled = qvla(
        "profile", tiny_checkpoint, "--recording", path, "--samples", 3, "--warmup", 1,
        "--output", tmp_path / "latency.json",
    )  # fmt: skip
    assert profiled.code == 0 and "p99" in profiled.out
    output = tmp_path / "replay.json"
    replayed = qvla("replay", path, tiny_checkpoint, "--output", output, "--max-drift", 1e-4)
    assert replayed.code == 0, replayed
    # Three observations have no p99.
    assert "dimension 3" in replayed.out and re.search(r"max \d+\.\d\d ms then", replayed.out)
    told = json.loads(output.read_text())
    assert told["drift"]["observations"] == 3 and told["dropped"] == 0
    assert max(told["drift"]["max_normalized"]) < 1e-4
    refused = qvla("replay", path, tiny_checkpoint, "--max-drift", -1)
    assert refused.code == 1 and "is above" in refused.err


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
