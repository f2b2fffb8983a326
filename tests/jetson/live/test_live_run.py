"""The live page and the recording of a control loop."""

from pathlib import Path

import numpy as np
import pytest
import requests
from browser import open_browser
from control_doubles import PICTURE, Bench, Notes, numbered
from metrics_pages import TOKEN, samples
from numpy.typing import NDArray

from jetson.board import read_board_state
from jetson.control.loop import ControlLoop
from jetson.errors import RefusedSetting
from jetson.live.loop_page import LoopWatch, live_page
from jetson.recording.reader import Recording
from jetson.recording.writer import McapRecorder
from jetson.serving.policy_contract import PolicyContract

CONTRACT = PolicyContract(("image",), 8, 3, 0, "tiny", "d1gest", "cpu")


def watched(bench: Bench, watch: LoopWatch) -> ControlLoop:
    bench.loop = ControlLoop(
        bench.camera, bench.engine, bench.robot, bench.safety, bench.settings, bench.clock, watch
    )
    watch.counters = bench.loop.counters
    return bench.loop


def too_far(request: int) -> NDArray[np.float32]:
    return numbered(request) + np.float32(0.98) * (np.arange(3) == 1).astype(np.float32)


def test_the_page_shows_the_loop(tmp_path: Path) -> None:
    notes = Notes()
    bench, watch = Bench(behaviour=too_far), LoopWatch(notes)
    watched(bench, watch)
    with live_page(watch, CONTRACT, bench.safety, "0") as url:
        assert requests.get(url + "/live/state", timeout=20).json()["loop"] is None
        bench.ticks(12)
        now = requests.get(url + "/live/state", timeout=20).json()
        page = samples(requests.get(url + "/metrics", timeout=20).text)
        assert now["loop"]["state"] == "running" and now["loop"]["slot"] == 11
        assert now["loop"]["command"] == list(notes.records[-1].action or ())
        assert now["limits"] == [[-1.0] * 3, [1.0] * 3]
        assert now["latest"]["number"] == len(notes.chunks) > 1
        assert now["latest"]["timing_ms"] == {"capture": 0.0, "total": 30.0}
        assert page["qvla_loop_sent_total", ()] == bench.loop.counters.sent
        assert page["qvla_loop_clamped_values_total", ()] == bench.loop.counters.clamped_values > 0
        assert page["qvla_actions_total", ()] == len(notes.chunks)
        with open_browser(tmp_path / "profile") as tab:
            tab.open(url + "/", 390, 844, True)
            tab.wait_for("document.getElementById('status').textContent == 'running'")
            assert tab.value("document.querySelectorAll('.outside .name')[0].textContent") == "1"
            bench.camera.stalled = True
            bench.ticks(25)
            tab.wait_for("document.getElementById('status').dataset.mood == 'warn'")
            assert "missed deadlines" in tab.value("document.getElementById('counts').textContent")
            assert tab.value("document.documentElement.scrollWidth") == 390
            assert tab.complaints == []


def test_the_page_of_a_loop_is_behind_the_same_token() -> None:
    bench, watch = Bench(), LoopWatch()
    for address in ("0.0.0.0:0", "[::]:0"):
        with (
            pytest.raises(RefusedSetting, match="token"),
            live_page(watch, CONTRACT, bench.safety, address),
        ):
            pass
    for address in ("", "here", "127.0.0.1:http"):
        with (
            pytest.raises(RefusedSetting, match="PORT"),
            live_page(watch, CONTRACT, bench.safety, address),
        ):
            pass
    with live_page(watch, CONTRACT, bench.safety, "127.0.0.1:0", TOKEN) as url:
        assert requests.get(url + "/", timeout=20).status_code == 401
        assert requests.get(url + "/", auth=("me", TOKEN), timeout=20).status_code == 200
        assert requests.post(url + "/act", auth=("me", TOKEN), timeout=20).status_code == 404
        port = url.rpartition(":")[2]
        with (
            pytest.raises(RefusedSetting, match="another --live"),
            live_page(watch, CONTRACT, bench.safety, f"127.0.0.1:{port}"),
        ):
            pass


def test_a_run_is_recorded_with_what_came_of_each_observation(tmp_path: Path) -> None:
    path, bench = tmp_path / "run.mcap", Bench(delay_s=0.15)
    with McapRecorder(path, CONTRACT, read_board_state, "run") as recorder:
        watch = LoopWatch(recorder)
        watched(bench, watch).run(seconds=3.0)
    recording = Recording(path)
    moments = list(recording.moments())
    assert recording.about["source"] == "run" and recording.counts is not None
    assert len(moments) > 4 and recording.counts["dropped"] == 0
    for index, moment in enumerate(moments):
        assert moment.chunk is not None
        np.testing.assert_array_equal(moment.chunk.actions, numbered(index))
        np.testing.assert_array_equal(moment.observation.images["image"], PICTURE.images["image"])
        assert moment.chunk.timing_ms == pytest.approx({"capture": 0.0, "total": 150.0}, abs=1e-6)
