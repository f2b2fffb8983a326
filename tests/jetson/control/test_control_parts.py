"""Sources, sinks, limits, settings, the recorder and the inference thread, each alone."""

import io
import json
import os
import threading
from pathlib import Path

import json_numpy
import numpy as np
import pytest
from control_doubles import HOLD, PICTURE, SAFE, Bench, LoopClock, safety, settings
from echo_policy import IMAGE, OFT, oft_fields
from hypothesis import given
from hypothesis import strategies as st

from jetson.control import loop_state
from jetson.control.camera import CameraSource, open_camera
from jetson.control.inference import InferenceResult, ThreadedInference
from jetson.control.loop_clock import MonotonicClock, SimulatedClock
from jetson.control.loop_state import TRANSITIONS, LoopState
from jetson.control.pipes import PipedSource
from jetson.control.records import JsonlRecorder
from jetson.control.safety import ActionSafety, action_safety
from jetson.control.sinks import Command, StreamSink
from jetson.control.sources import EpisodeSource, PushedSource, TimedObservation
from jetson.errors import RefusedSetting, RequestTooLarge, WireError
from jetson.policy import UnsafeAction
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.normalization import Bounds
from qvla_export.shared.observation import Observation

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)
VECTORS = st.lists(FLOATS, min_size=3, max_size=3).map(lambda v: np.array(v, np.float32))
INSIDE = st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3)


@given(VECTORS, INSIDE.map(lambda v: np.array(v, np.float32)), st.sampled_from([np.inf, 0.1]))
def test_what_is_admitted_is_finite_inside_and_near(action, last, max_step) -> None:
    limits = safety(max_step)
    if not np.isfinite(action).all():
        with pytest.raises(UnsafeAction, match="finite"):
            limits.admit(action, last)
        return
    admitted = limits.admit(action, last).action
    assert (np.abs(admitted) <= 1).all()
    assert (np.abs(admitted - last) <= max_step * 1.0001).all()
    assert limits.admit(admitted, admitted).clamped == 0, "a command may be repeated"


def test_what_float32_cannot_say_is_cut_too() -> None:
    assert safety().admit(np.array([1e300, -1e300, 0.5]), None).action.tolist() == [1, -1, 0.5]


def test_limits_are_not_widened_by_rounding() -> None:
    low, high = np.array([-0.1, 0.3]), np.array([0.1, 0.3])
    made = action_safety(Bounds(low, high, np.ones(2, bool)), np.array([0, np.nan]))
    assert made.low.astype(np.float64)[0] >= low[0] and made.high.astype(np.float64)[0] <= high[0]
    assert made.low[1] == made.high[1], "a dimension that never moves keeps one value"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": np.full(3, 2, np.float32)}, "ordered"),
        ({"high": np.full(3, np.nan, np.float32)}, "finite"),
        ({"hold": np.array([2, 0, 0], np.float32)}, "hold action must be inside"),
        ({"safe": np.array([0, -2, 0], np.float32)}, "safe action must be inside"),
        ({"max_step": np.array([1, 0, 1], np.float32)}, "step"),
        ({"max_step": np.full(3, 1e-9, np.float32)}, "resolve"),
        ({"hold": np.zeros(2, np.float32)}, "size"),
    ],
)
def test_impossible_limits_are_refused(changes, message: str) -> None:
    one = np.ones(3, np.float32)
    given_ = {"low": -one, "high": one, "hold": HOLD, "safe": SAFE, "max_step": one}
    with pytest.raises(RefusedSetting, match=message):
        ActionSafety(**{**given_, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"rate_hz": 0},
        {"rate_hz": float("nan")},
        {"max_action_age_ms": float("inf")},
        {"max_observation_age_ms": 2000},
        {"execute": 0},
        {"mode": "both"},
        {"ensemble_decay": float("inf")},
        {"hold_ms": -1},
        {"give_up_s": 0},
    ],
)
def test_impossible_settings_are_refused(changes) -> None:
    with pytest.raises(RefusedSetting, match=next(iter(changes))):
        settings(**changes)


def test_the_picture_names_every_state_and_ends_are_ends() -> None:
    assert all(state.name in str(loop_state.__doc__) for state in LoopState)
    assert set(TRANSITIONS) == set(LoopState)
    assert all(bool(TRANSITIONS[state]) != state.terminal for state in LoopState)
    assert all(LoopState.FAULT in TRANSITIONS[state] for state in LoopState if not state.terminal)


def test_the_clock_never_wakes_early() -> None:
    clock = MonotonicClock()
    for wait_s in (0.003, 0.0, -1.0):
        deadline_s = clock.now_s() + wait_s
        clock.sleep_until(deadline_s)
        assert clock.now_s() >= deadline_s


def test_pushed_observations_are_never_older_or_from_the_future() -> None:
    clock = LoopClock(10.0)
    source = PushedSource(clock)
    assert source.read() is None
    source.push(PICTURE, 9.0)
    source.push(Observation(PICTURE.images, "late"), 8.0)
    assert source.read() == TimedObservation(PICTURE, 9.0)
    source.push(PICTURE, 99.0)
    assert source.read().observed_s == 10.0
    assert not source.is_over
    source.end()
    assert source.is_over


@pytest.mark.parametrize("stamp", [float("nan"), float("-inf")])
def test_a_stamp_that_is_no_time_blocks_none_after_it(stamp: float) -> None:
    source = PushedSource(LoopClock(10.0))
    source.push(PICTURE, stamp)
    source.push(PICTURE, 9.0)
    source.push(PICTURE, stamp)
    assert source.read() == TimedObservation(PICTURE, 9.0)


def test_an_episode_is_played_at_its_own_speed() -> None:
    clock, loaded = SimulatedClock(5.0), []

    def load(frame: int) -> Observation:
        loaded.append(frame)
        return PICTURE

    source = EpisodeSource([7.0, 7.1, 7.2], load, clock, "say this")
    assert source.read().observed_s == 5.0 and source.read().observation.instruction == "say this"
    clock.time_s = 5.15
    assert source.read().observed_s == pytest.approx(5.1)
    assert not source.is_over
    clock.time_s = 5.201
    assert source.read().observed_s == pytest.approx(5.2) and source.is_over
    assert loaded == [0, 1, 2], "a frame is read once"
    with pytest.raises(RefusedSetting, match="ascending"):
        EpisodeSource([0.0, 0.0], load, clock)


def test_a_driver_behind_a_pipe_reads_lines() -> None:
    stream = io.StringIO()
    action = np.array([0.5, -1], np.float32)
    StreamSink(stream).send(Command(3, action, 1.5, 1.25, "running", 2.25))
    assert json.loads(stream.getvalue()) == {
        "slot": 3, "action": [0.5, -1.0], "sent_s": 1.5, "observed_s": 1.25, "age_ms": 250.0,
        "deadline_s": 2.25, "state": "running",
    }  # fmt: skip


def piped(*bodies: bytes, limit: int = 1 << 20) -> PipedSource:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as stream, os.fdopen(writing, "wb", 0) as client:
        source = PipedSource(stream, OFT, LoopClock(10.0), limit)
        client.write(b"\n".join(bodies))
        client.close()
        while not source.is_over:
            threading.Event().wait(0.001)
        source.close()
    return source


def test_a_client_behind_a_pipe_is_read_line_by_line() -> None:
    body = json_numpy.dumps(oft_fields()).encode()
    seen = piped(body, body).read()
    assert seen is not None and seen.observed_s == 10.0
    assert list(seen.observation.images) == ["front", "hand"]
    assert (seen.observation.images["front"] == IMAGE).all()
    for wrong, kind in ((b"{", WireError), (body[:90] + b"}", WireError), (b"[]", WireError)):
        source = piped(body, wrong)
        with pytest.raises(kind):
            source.read()
        assert source.read() is not None, "one bad line is one failure"
    with pytest.raises(RequestTooLarge, match="99 bytes"):
        piped(body, limit=99).read()


def test_the_record_says_what_happened_at_each_slot(tmp_path: Path) -> None:
    bench = Bench()
    bench.loop._recorder = recorder = JsonlRecorder(tmp_path / "new" / "run.jsonl")
    bench.ticks(5)
    records = [bench.loop.tick() for _ in range(3)] + bench.finish()
    recorder.close()
    lines = [json.loads(line) for line in (tmp_path / "new/run.jsonl").read_text().splitlines()]
    assert [line["slot"] for line in lines] == list(range(5 + len(records)))
    for line, record in zip(lines[5:], records, strict=True):
        assert line["state"] == record.state.value and line["age_ms"] == record.age_ms
        assert tuple(line["action"]) == record.action
    assert lines[-1]["state"] == "stopped"


def test_a_record_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    path.write_text("of yesterday")
    with pytest.raises(RefusedSetting, match=r"run\.jsonl exists; recordings are not overwritten"):
        JsonlRecorder(path)
    assert path.read_text() == "of yesterday"
    with pytest.raises(RefusedSetting, match="cannot record to"):
        JsonlRecorder(path / "run.jsonl")


class Gate:
    """A policy that waits to be let through."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.asked = threading.Event()

    def infer(self, observation: Observation) -> ActionChunk:
        self.asked.set()
        self.open.wait()
        if observation.instruction == "fail":
            raise SystemError("engine lost")
        return ActionChunk(np.ones((2, 3), np.float32), np.ones((2, 3), np.float32))


def result_of(inference: ThreadedInference) -> InferenceResult:
    while (result := inference.poll()) is None:
        assert inference.busy
    return result


def test_the_thread_computes_beside_and_survives_failures() -> None:
    policy = Gate()
    inference = ThreadedInference(policy, MonotonicClock())
    inference.request(TimedObservation(PICTURE, 1.0))
    policy.asked.wait()
    assert inference.busy and inference.poll() is None
    policy.open.set()
    done = result_of(inference)
    assert done.chunk is not None and done.observation.observed_s == 1.0 and not inference.busy
    inference.request(TimedObservation(Observation(PICTURE.images, "fail"), 2.0))
    assert isinstance(result_of(inference).error, SystemError)
    inference.request(TimedObservation(PICTURE, 3.0))
    assert result_of(inference).chunk is not None
    inference.close()


class FakeCapture:
    """Gives frames until it breaks."""

    def __init__(self, level: int, frames: int) -> None:
        self.level, self.frames = level, frames

    def grab(self) -> bool:
        self.frames -= 1
        return self.frames >= 0

    def retrieve(self) -> tuple[bool, object]:
        frame = np.zeros((2, 3, 3), np.uint8)
        frame[..., 0], frame[..., 2] = 7, self.level
        return True, frame

    def release(self) -> None:
        self.frames = 0


def until_read(source: CameraSource) -> TimedObservation:
    while (seen := source.read()) is None:
        threading.Event().wait(0.001)
    return seen


def test_cameras_are_read_together_and_opened_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jetson.control.camera._REOPEN_S", 0.001)
    opened: list[int] = []

    def opener() -> FakeCapture:
        opened.append(len(opened))
        if len(opened) == 2:
            raise RefusedSetting("not yet")
        return FakeCapture(100, 1 if len(opened) < 4 else 1 << 40)

    clock = MonotonicClock()
    endless = {"front": opener, "hand": lambda: FakeCapture(50, 1 << 40)}
    source = CameraSource(endless, "look", clock, lambda: np.ones(2, np.float32))
    seen = until_read(source)
    while len(opened) < 4:
        threading.Event().wait(0.001)
    source.close()
    assert list(seen.observation.images) == ["front", "hand"]
    assert seen.observation.images["front"][0, 0].tolist() == [100, 0, 7], "RGB, not BGR"
    assert seen.observation.state.tolist() == [1, 1] and seen.observed_s <= clock.now_s()
    assert not source.is_over


def test_opencv_reads_a_recorded_camera(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    video = str(tmp_path / "camera.avi")
    writer = cv2.VideoWriter(video, cv2.VideoWriter_fourcc(*"MJPG"), 10, (64, 48))
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[..., 2] = 200  # red, in OpenCV's order
    for _ in range(5):
        writer.write(frame)
    writer.release()
    source = CameraSource({"image": lambda: open_camera(video)}, "look", MonotonicClock())
    image = until_read(source).observation.images["image"]
    source.close()
    assert image.shape == (48, 64, 3) and image.dtype == np.uint8
    assert image[..., 0].mean() > 150 and image[..., 2].mean() < 50
    with pytest.raises(RefusedSetting, match="cannot open the camera"):
        open_camera("/dev/video99")
