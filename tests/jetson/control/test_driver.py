"""The driver's side of the control loop: one command in the pipe, and none too old."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO, TextIO

import numpy as np
import pytest
from control_doubles import PICTURE, Bench, LoopClock, numbered, safety, settings
from numpy.typing import NDArray
from places import ROOT

from jetson.clients.command_reader import CommandReader
from jetson.control.loop_clock import MonotonicClock, boot_time_s
from jetson.control.loop_state import LoopState
from jetson.control.sinks import Command, StreamSink
from jetson.control.sources import TimedObservation
from jetson.errors import CommandNotTaken

MAX_STEP = 0.125


@contextlib.contextmanager
def pipe() -> Iterator[tuple[BinaryIO, TextIO]]:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as driver, os.fdopen(writing, "w") as commands:
        yield driver, commands


def command(slot: int, sent_s: float, deadline_s: float) -> Command:
    return Command(slot, np.full(3, slot / 10, np.float32), sent_s, sent_s, "running", deadline_s)


def line_of(slot: int) -> str:
    value = {"slot": slot, "action": [0, 0, 0], "sent_s": 1.0, "observed_s": None}
    return json.dumps({**value, "deadline_s": 9.0, "state": "running"}) + "\n"


def test_a_driver_that_paused_finds_one_command_and_refuses_it() -> None:
    """Six seconds at 20 Hz were 117 commands at once."""
    bench = Bench(settings(rate_hz=20, execute=8))
    with pipe() as (driver, commands):
        bench.loop._sink = StreamSink(commands)
        bench.ticks(5)
        reader = CommandReader(driver, 3, now_s=bench.clock.now_s)
        assert reader.read() is not None
        before = bench.loop.counters.dropped_commands
        records = bench.ticks(120)
        assert reader.read() is None and reader.counters.expired == 1
        assert reader.counters.replaced == reader.counters.queued == 0, "the pipe holds one"
        dropped = bench.loop.counters.dropped_commands - before
        assert dropped == sum(record.sent_s is None for record in records) == 119
        assert any("driver has not read" in event for r in records for event in r.events)
        bench.ticks(2)
        assert reader.read() is not None, "and the run went on"


def test_a_driver_stopped_with_a_command_in_hand_is_handed_the_newer_one_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pipe was empty when the second was written: it never held two."""
    read, later = os.read, [command(2, 2.0, 9.0)]
    with pipe() as (driver, commands):
        sink = StreamSink(commands)
        reader = CommandReader(driver, 3, now_s=lambda: 2.0)

        def stopped_after(descriptor: int, size: int) -> bytes:
            received = read(descriptor, size)
            while later:
                sink.send(later.pop())
            return received

        monkeypatch.setattr(os, "read", stopped_after)
        sink.send(command(1, 1.0, 9.0))
        received = reader.read()
        assert received is not None and received.slot == 2
        assert (reader.counters.replaced, reader.counters.queued) == (1, 0)
        assert reader.read() is None and reader.counters.taken == 1


@pytest.mark.parametrize("count", [2, 5])
def test_a_pipe_that_held_several_commands_is_told(count: int) -> None:
    with pipe() as (driver, commands):
        reader = CommandReader(driver, 3, now_s=lambda: 2.0)
        for slot in range(count):
            # Without looking whether the one before was read.
            commands.write(line_of(slot))
        commands.flush()
        received = reader.read()
        assert received is not None and received.slot == count - 1
        assert reader.counters.queued == count - 1 and reader.counters.taken == 1


def test_after_a_pause_the_next_command_is_near_the_last_that_was_taken() -> None:
    def far(request: int) -> NDArray[np.float32]:
        return np.full((8, 3), 1.0 if request % 2 else -1.0, np.float32)

    bench = Bench(settings(execute=2), safety(MAX_STEP), far)
    rng = np.random.default_rng(3)
    with pipe() as (driver, commands):
        bench.loop._sink = StreamSink(commands)
        reader = CommandReader(driver, 3, now_s=lambda: 0.0)  # nothing is ever too old
        taken = []
        while len(taken) < 60:
            bench.ticks(int(rng.integers(1, 9)))
            received = reader.read()
            assert received is not None
            taken.append(received.action)
    steps = np.abs(np.diff(taken, axis=0))
    assert steps.max() <= MAX_STEP + 1e-6 and steps.max() > 0


def test_a_driver_that_takes_nothing_for_too_long_is_a_fault() -> None:
    bench = Bench(settings(give_up_s=2.0))
    with pipe() as (_, commands):
        bench.loop._sink = StreamSink(commands)
        result = bench.loop.run(60.0)
    assert result.state is LoopState.FAULT
    assert result.reason == "the driver has taken no command for 2 s"
    assert result.counters["dropped_commands"] > 30
    assert bench.clock.time_s < 106, "the safe action is not waited for without end"


def test_a_driver_that_comes_back_gets_the_whole_ramp_to_the_safe_action() -> None:
    bench = Bench(settings(ramp_ms=500, give_up_s=60.0))
    with pipe() as (driver, commands):
        bench.loop._sink = StreamSink(commands)
        reader = CommandReader(driver, 3, now_s=lambda: 0.0)
        for _ in range(6):
            bench.loop.tick()
            reader.read()
        bench.loop.stop("asked")
        bench.ticks(30)  # the driver does not look; the ramp waits for it
        positions = []
        while not bench.loop.state.terminal or not positions:
            received = reader.read()
            if received is not None:
                positions.append(received.action[1])
            bench.loop.tick()
        last = reader.read()
        assert last is not None and last.state == "stopped" and last.action[1] == 0.25
    assert np.diff([*positions, last.action[1]]).max() < 0.1, "no part of it is left out"


@pytest.mark.parametrize("kind", ["file", "memory", "null"])
def test_what_nobody_need_read_is_written_without_waiting(kind: str, tmp_path) -> None:
    path = os.devnull if kind == "null" else tmp_path / "commands"
    with open(path, "w") as stream:  # noqa: PTH123 - a device is no Path's business
        sink = StreamSink(stream)
        for slot in range(3):
            sink.send(command(slot, 1.0, 2.0))
    if kind == "file":
        assert len((tmp_path / "commands").read_text().splitlines()) == 3


def test_sockets_and_terminals_hold_one_command_too() -> None:
    import pty
    import socket

    ours, theirs = socket.socketpair()
    with ours, theirs, ours.makefile("w") as stream:
        sink = StreamSink(stream)
        sink.send(command(0, 1.0, 2.0))
        with pytest.raises(CommandNotTaken):
            sink.send(command(1, 1.0, 2.0))
        assert json.loads(theirs.recv(1 << 16))["slot"] == 0
        sink.send(command(2, 1.0, 2.0))
    controller, terminal = pty.openpty()
    with os.fdopen(controller, "rb", 0), os.fdopen(terminal, "w") as stream:
        StreamSink(stream).send(command(0, 1.0, 2.0))


@pytest.mark.parametrize(
    "line",
    [
        b"", b"{", b"[]", b"null", b'"x"', b"7" * 5000, b"[" * 3000, b"\xff\xfe",
        b'{"slot": 1}', json.dumps({"action": [1, 2]}).encode(),
    ],
)  # fmt: skip
def test_lines_that_are_no_command_are_counted_and_passed_over(line: bytes) -> None:
    good = {"slot": 1, "action": [0, 0, 0], "sent_s": 1.0, "observed_s": None, "deadline_s": 9.0}
    wrong = [
        {**good, "state": "running", **change}
        for change in (
            {"action": [0, 0]}, {"action": [0, float("nan"), 0]}, {"deadline_s": float("nan")},
            {"sent_s": None}, {"action": "x"}, {"slot": float("inf")},
        )
    ]  # fmt: skip
    with pipe() as (driver, commands):
        reader = CommandReader(driver, 3, now_s=lambda: 2.0)
        os.write(commands.fileno(), line + b"\n")
        for value in wrong:
            os.write(commands.fileno(), json.dumps(value).encode() + b"\n")
        os.write(commands.fileno(), json.dumps({**good, "state": "running"}).encode() + b"\n")
        received = reader.read()
        assert received is not None and received.slot == 1
        assert reader.counters.malformed == 1 + len(wrong)


def test_a_reader_on_another_machine_measures_age_from_the_quickest_line() -> None:
    here = LoopClock(5_000.0)  # the writer's clock says 100
    with pipe() as (driver, commands):
        reader = CommandReader(driver, 3, same_machine=False, now_s=here.now_s)
        sink = StreamSink(commands)
        for delay_s, fresh in ((0.3, True), (0.02, True), (0.4, True), (1.5, False)):
            here.time_s += 1.0
            sent_s = here.time_s - 4_900.0 - delay_s
            sink.send(command(1, sent_s, sent_s + 1.0))
            assert (reader.read() is not None) == fresh
        assert reader.counters.expired == 1


def test_stamps_that_are_no_time_or_not_yet_are_not_believed() -> None:
    bench = Bench()
    bench.ticks(6)
    for stamp in (np.nan, np.inf, -np.inf):
        bench.camera.stalled, bench.camera.last = True, TimedObservation(PICTURE, stamp)
        before = bench.loop.counters.dropped_observations
        bench.ticks(20)
        assert bench.loop.counters.dropped_observations > before
        assert bench.loop.state is not LoopState.RUNNING
    bench.camera.last = TimedObservation(PICTURE, bench.clock.time_s + 1e9)
    bench.ticks(3)
    assert bench.notes.observations[-1].observed_s <= bench.clock.time_s
    records = bench.ticks(40)
    ages = [record.age_ms for record in records if record.age_ms is not None]
    assert all(0 <= age <= 1000 + 1e-6 for age in ages)


def test_an_action_that_grew_old_on_its_way_out_is_not_sent() -> None:
    bench = Bench()
    bench.ticks(6)
    proceed = bench.loop._supervisor.proceed

    def stopped(*arguments):
        decision = proceed(*arguments)
        bench.clock.time_s += 5.0  # SIGSTOP between the decision and the write
        return decision

    bench.loop._supervisor.proceed = stopped
    count = len(bench.robot.commands)
    record = bench.loop.tick()
    assert record.sent_s is None and len(bench.robot.commands) == count
    assert "too old between decision and sending" in record.events[-1]


def test_time_that_the_machine_slept_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before_s = MonotonicClock().now_s()
    assert abs(before_s - time.clock_gettime(time.CLOCK_BOOTTIME)) < 60
    real = time.clock_gettime
    slept = {time.CLOCK_BOOTTIME: 3600.0}
    monkeypatch.setattr(time, "clock_gettime", lambda clock: real(clock) + slept.get(clock, 0.0))
    assert MonotonicClock().now_s() - before_s >= 3600 and boot_time_s() - before_s >= 3600


def test_a_run_ends_well_though_its_client_keeps_the_pipe_open() -> None:
    """It aborted: the interpreter cannot end while a thread waits inside stdin's buffer."""
    program = (
        "import sys\n"
        "from jetson.control.loop_clock import MonotonicClock\n"
        "from jetson.control.pipes import PipedSource\n"
        "from jetson.serving.policy_contract import PolicyContract\n"
        "contract = PolicyContract(('image',), 8, 7, 0, 'test')\n"
        "source = PipedSource(sys.stdin.buffer, contract, MonotonicClock())\n"
        "print(source.read(), source.is_over, flush=True)\n"
        "source.close()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read() == b"None False\n"
        assert process.wait() == 0 and process.stderr.read() == b""


@dataclass
class JumpyClock(LoopClock):
    """Time that is lost anywhere: between any two looks at it the process may be stopped."""

    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def now_s(self) -> float:
        if self.rng.random() < 0.01:
            self.time_s += float(self.rng.exponential(0.4))
        return self.time_s


def injure(bench: Bench, rng: np.random.Generator) -> None:
    """Break, or mend, something."""
    kind = rng.integers(8)
    bench.camera.error = OSError("unplugged") if kind == 0 else None
    bench.camera.stalled = kind == 1
    stamp = rng.choice([np.nan, np.inf, -np.inf, 1e12, -5.0])
    if kind == 2:
        bench.camera.stalled, bench.camera.last = True, TimedObservation(PICTURE, float(stamp))
    bench.camera.lag_s = float(rng.exponential(0.3)) if kind == 3 else 0.0
    bench.camera.slow_s = float(rng.exponential(0.2)) if kind == 4 else 0.0
    bench.engine.delay_s = float(rng.exponential(0.5)) if kind == 5 else 0.03
    bench.clock.oversleep_s = float(rng.exponential(1.0)) if kind == 6 else 0.0


def faulty_run(seed: int, ticks: int) -> tuple[int, int, int]:
    """Return commands that reached the driver, those it refused and those dropped for it."""
    rng = np.random.default_rng(seed)

    def behaviour(request: int) -> NDArray[np.float32]:
        kind = rng.integers(10)
        if kind == 0:
            raise RuntimeError("engine lost")
        actions = numbered(request) + rng.normal(0, 1.5, (8, 3)).astype(np.float32)
        if kind == 1:
            actions[rng.integers(8)] = rng.choice([np.nan, np.inf, -np.inf])
        return actions[:, : rng.integers(1, 3)] if kind == 2 else actions

    bench = Bench(settings(give_up_s=5.0, hold_ms=200), safety(MAX_STEP), behaviour)
    clock = bench.clock = JumpyClock(100.0, rng=rng)
    bench.camera.clock = bench.engine.clock = bench.loop._clock = clock
    with pipe() as (driver, commands):
        bench.loop._sink = StreamSink(commands)
        reader = CommandReader(driver, 3, now_s=lambda: clock.time_s)
        wakes_s = 0.0
        for _ in range(ticks):
            if bench.loop.state.terminal:
                break
            if rng.random() < 0.2:
                injure(bench, rng)
            bench.loop.tick()
            if clock.time_s < wakes_s:
                continue
            received = reader.read()
            if received is not None:
                check(received, clock.time_s)
            if rng.random() < 0.03:
                wakes_s = clock.time_s + float(rng.exponential(2.0))
        counters = reader.counters
        assert counters.malformed == counters.replaced == counters.queued == 0
    return counters.taken, counters.expired, bench.loop.counters.dropped_commands


def check(received: Command, now_s: float) -> None:
    """A command of at most a second's age, finite and inside the limits."""
    assert now_s - received.sent_s <= 1.0 + 1e-9
    if received.observed_s is not None:
        assert 0 <= now_s - received.observed_s <= 1.0 + 1e-9
    assert np.isfinite(received.action).all() and np.abs(received.action).max() <= 1


def commands_under_faults(wanted: int) -> tuple[int, int]:
    taken = expired = dropped = seed = 0
    while taken < wanted:
        run = faulty_run(seed, 400)
        taken, expired, dropped = taken + run[0], expired + run[1], dropped + run[2]
        seed += 1
    return expired, dropped


def test_no_command_reaches_the_driver_too_old_or_out_of_limits_whatever_fails() -> None:
    expired, dropped = commands_under_faults(2_500)
    assert expired > 0 and dropped > 0, "drivers did pause"


@pytest.mark.slow
def test_fifty_thousand_commands_under_faults() -> None:
    expired, dropped = commands_under_faults(50_000)
    print(f"50000 commands taken, {expired} refused as too old, {dropped} not written")
