"""Recordings: what was seen and done comes back, and other files are refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from echo_policy import OFT
from mcap.reader import make_reader
from small_recordings import recorded, recorder, same, served

from jetson.errors import PolicyFailure, RefusedSetting
from jetson.recording.reader import Recording
from jetson.serving.request_observer import ServedRequest
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.observation import Observation


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


def test_a_recording_that_ended_well_says_so(tmp_path: Path) -> None:
    recording = recorded(tmp_path / "run.mcap", [served(0)])
    assert recording.ended is None, "not known before it was read"
    list(recording.moments())
    assert recording.ended == "complete"


@pytest.mark.parametrize("content", [b"", b"not a recording", b"\x89MCAP0\r\n"])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "other.mcap"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="qvla serve --record"):
        Recording(path)
    with pytest.raises(ArtifactError, match="cannot be read"):
        Recording(tmp_path / "missing.mcap")
