"""A recorder whose disk is slow, full or hung, or that is killed: its file is read up to there."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from control_doubles import Bench
from echo_policy import OFT
from hypothesis import given
from hypothesis import strategies as st
from places import HELPERS, ROOT
from small_recordings import same, served

from jetson.board import read_board_state
from jetson.control.loop_state import LoopState
from jetson.recording import writer
from jetson.recording.queue import DropQueue, QueuedWrite
from jetson.recording.reader import Recording
from jetson.recording.writer import McapRecorder


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


def test_a_disk_that_does_not_answer_is_told_of_and_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, asked = threading.Event(), threading.Event()

    def hung() -> Any:
        asked.set()
        gate.wait(20)
        return read_board_state()

    writing = McapRecorder(tmp_path / "run.mcap", OFT, hung, "serve")
    writing.on_request(served(0))
    assert asked.wait(20) and writing.failure is None
    monkeypatch.setattr(writer, "_STUCK_S", -1.0)
    monkeypatch.setattr(writer, "_CLOSING_S", 0.0)
    assert "does not answer" in str(writing.failure)
    writing.close()
    assert writing._thread.is_alive(), "it waits alone"
    gate.set()
    writing._thread.join(20)
    list((recording := Recording(writing.path)).moments())
    assert recording.ended == "complete"


def test_the_control_loop_hears_of_it_once(tmp_path: Path) -> None:
    writing, gate = failing_recorder(tmp_path / "run.mcap")
    gate.set()
    writing._thread.join(20)
    bench = Bench()
    bench.loop._recorder = writing
    bench.ticks(20)
    assert bench.loop.counters.faults == 1 and writing.dropped > 10
    assert bench.loop.state is LoopState.RUNNING


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
