"""Model-based test: whatever is late, broken or wrong, the robot's safety properties hold.

A model beside the loop knows, from the chunks the loop was given and the commands the robot got,
which action is due at each slot. Time is virtual; delays, stalls and failures come in any order.
"""

import numpy as np
from control_doubles import Bench, numbered, safety, settings
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from numpy.typing import NDArray

from jetson.control.chunks import TimedChunk
from jetson.control.loop_state import TRANSITIONS, LoopState
from jetson.control.records import StepRecord

GIVE_UP_S = 6.0
NEVER_S = 1e9


def wild(request: int) -> NDArray[np.float32]:
    return np.random.default_rng(request).uniform(-1e30, 1e30, (8, 3)).astype(np.float32)


def jumping(request: int) -> NDArray[np.float32]:
    return np.full((8, 3), 0.9 * (-1) ** request, np.float32)


def poisoned(request: int) -> NDArray[np.float32]:
    actions = numbered(request)
    actions[request % 3 :, request % 3] = (np.nan, np.inf, -np.inf)[request % 3]
    return actions


def misshapen(request: int) -> NDArray[np.float32]:
    return np.zeros(((8, 2), (0, 3), (3,), (1, 8, 3))[request % 4], np.float32)


def broken(request: int) -> NDArray[np.float32]:
    raise (RuntimeError, ValueError, MemoryError)[request % 3]("out of order")


BEHAVIOURS = (numbered, wild, jumping, poisoned, misshapen, broken)


class Model:
    """Which action is due, told from outside."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.newest: TimedChunk | None = None
        # Policy commands sent when the newest chunk's observation was taken.
        self.first = 0
        self.known = 0
        self.looked, self.looked_s = 0, -np.inf
        # Times of commands that were the policy's, and of those that moved the robot otherwise.
        self.policy_s: list[float] = []
        self.displaced_s = -np.inf

    def due(self, now_s: float) -> tuple[TimedChunk, int] | None:
        for chunk in self.bench.notes.chunks[self.known :]:
            first = sum(sent_s <= chunk.observed_s for sent_s in self.policy_s)
            step = len(self.policy_s) - first
            if chunk.observed_s >= self.displaced_s and self.speaks(chunk, step, now_s):
                self.newest, self.first = chunk, first
        self.known = len(self.bench.notes.chunks)
        if self.newest is None:
            return None
        step = len(self.policy_s) - self.first
        return (self.newest, step) if self.speaks(self.newest, step, now_s) else None

    def speaks(self, chunk: TimedChunk, step: int, now_s: float) -> bool:
        young = (now_s - chunk.observed_s) * 1000 <= self.bench.settings.max_action_age_ms
        return step < len(chunk.actions) and young


class ControlLoopMachine(RuleBasedStateMachine):
    """Receding horizon, with and without a largest step."""

    @initialize(
        rate_hz=st.sampled_from([5.0, 10.0, 29.97]),
        execute=st.sampled_from([1, 3, 8]),
        max_step=st.sampled_from([np.inf, 0.3, 0.02]),
        bound_ms=st.sampled_from([400.0, 1000.0]),
        hold_ms=st.sampled_from([0.0, 500.0]),
        ramp_ms=st.sampled_from([0.0, 800.0]),
        mode=st.sampled_from(["receding", "receding", "ensemble"]),
    )
    def start(
        self,
        rate_hz: float,
        execute: int,
        max_step: float,
        bound_ms: float,
        hold_ms: float,
        ramp_ms: float,
        mode: str,
    ) -> None:
        wanted = settings(
            rate_hz=rate_hz,
            execute=execute,
            max_action_age_ms=bound_ms,
            max_observation_age_ms=bound_ms / 2,
            hold_ms=hold_ms,
            ramp_ms=ramp_ms,
            give_up_s=GIVE_UP_S,
            mode=mode,
        )
        self.bench = Bench(wanted, safety(max_step))
        self.model = Model(self.bench)
        self.asked_to_stop = False
        self.state = LoopState.STARTING
        self.slot = -1
        self.last: NDArray[np.float32] | None = None
        self.held_since_s = 0.0
        self.moved_s = self.bench.clock.time_s

    @property
    def running(self) -> bool:
        return not self.state.terminal

    @precondition(lambda self: self.running)
    @rule(count=st.integers(1, 25))
    def let_time_pass(self, count: int) -> None:
        for _ in range(count):
            if self.running:
                self.tick()

    @rule(delay_s=st.sampled_from([0.0, 0.03, 0.03, 0.12, 0.3, 0.9, 2.0]))
    def the_engine_sleeps(self, delay_s: float) -> None:
        self.bench.engine.delay_s = delay_s

    @rule(behaviour=st.sampled_from(BEHAVIOURS))
    def the_engine_behaves(self, behaviour: object) -> None:
        self.bench.engine.behaviour = behaviour

    @rule(paused=st.sampled_from([False, False, True]))
    def the_client_pauses(self, paused: bool) -> None:
        self.bench.engine.ready_s = self.bench.clock.time_s + (NEVER_S if paused else 0)

    @rule(stalled=st.sampled_from([False, False, True]))
    def the_camera_stalls(self, stalled: bool) -> None:
        self.bench.camera.stalled = stalled

    @rule(lag_s=st.sampled_from([0.0, 0.0, 0.0, 0.1, 0.35, 2.0]))
    def the_camera_lags(self, lag_s: float) -> None:
        self.bench.camera.lag_s = lag_s

    @rule(unplugged=st.sampled_from([False, False, False, True]))
    def the_camera_is_unplugged(self, unplugged: bool) -> None:
        self.bench.camera.error = OSError("no device") if unplugged else None

    @rule(slow_s=st.sampled_from([0.0, 0.0, 0.01, 0.15, 0.5]), robot=st.booleans())
    def something_is_slow(self, slow_s: float, robot: bool) -> None:
        (self.bench.robot if robot else self.bench.camera).slow_s = slow_s

    @rule(lost_s=st.floats(0, 1.2))
    def the_machine_is_busy(self, lost_s: float) -> None:
        self.bench.clock.oversleep_s = lost_s

    @precondition(lambda self: self.running)
    @rule()
    def it_recovers_when_all_is_well(self) -> None:
        self.heal()
        for _ in range(200):
            if not self.running or self.state is LoopState.RUNNING:
                break
            self.tick()
        assert self.state is LoopState.RUNNING or self.state.terminal

    def it_stops_when_asked(self) -> None:
        self.bench.loop.stop("asked")
        self.asked_to_stop = True
        for _ in range(1000):
            if not self.running:
                return
            self.tick()
        raise AssertionError("it does not stop")

    def heal(self) -> None:
        bench = self.bench
        bench.engine.behaviour, bench.engine.delay_s = numbered, 0.03
        bench.engine.ready_s = bench.clock.time_s
        bench.camera.stalled, bench.camera.lag_s, bench.camera.error = False, 0.0, None
        bench.camera.slow_s = bench.robot.slow_s = 0.0

    def tick(self) -> None:
        count = len(self.bench.robot.commands)
        record = self.bench.loop.tick()
        sent = self.bench.robot.commands[count:]
        assert len(sent) == (record.sent_s is not None), "one command a slot at most"
        if any("inference" in event for event in record.events):
            self.model.newest = None
        for seen in self.bench.notes.observations[self.model.looked :]:
            age_ms = (self.bench.clock.time_s - seen.observed_s) * 1000
            assert age_ms <= self.bench.settings.max_observation_age_ms
            assert seen.observed_s > self.model.looked_s, "no picture is asked about twice"
            self.model.looked_s = seen.observed_s
        self.model.looked = len(self.bench.notes.observations)
        self.check_slot(record)
        self.check_state(record)
        if record.sent_s is not None:
            self.check_command(record, np.asarray(record.action, np.float32))
        self.state, self.slot = record.state, record.slot

    def check_slot(self, record: StepRecord) -> None:
        assert record.slot > self.slot
        period_s = self.bench.settings.period_s
        assert abs(record.due_s - 100.0 - record.slot * period_s) < 1e-6, "slots do not drift"
        if record.late_ms is not None:
            assert -1e-3 <= record.late_ms < period_s * 1000, "each command inside its slot"

    def check_state(self, record: StepRecord) -> None:
        state = record.state
        assert state is self.state or state in TRANSITIONS[self.state], (self.state, state)
        moved = self.last is not None or record.sent_s is not None
        assert (record.sent_s is not None) == (moved and not (state.terminal and not moved))
        if state in (LoopState.STOPPED, LoopState.STOPPING):
            assert self.asked_to_stop or state is LoopState.STOPPING
        if not self.asked_to_stop and state is LoopState.FAULT:
            assert record.due_s + 1 - self.moved_s >= GIVE_UP_S

    def check_command(self, record: StepRecord, action: NDArray[np.float32]) -> None:
        assert np.isfinite(action).all() and (np.abs(action) <= 1).all()
        last, step = self.last, self.bench.safety.max_step
        if last is not None:
            assert (np.abs(action - last) <= step * 1.0001).all(), "no jump"
        if record.state is LoopState.RUNNING:
            self.check_policy_action(record, action)
        else:
            assert record.observed_s is None and last is not None
            self.check_substitute(record, action, last)
        self.last = action

    def check_policy_action(self, record: StepRecord, action: NDArray[np.float32]) -> None:
        assert record.observed_s is not None and record.sent_s is not None
        age_ms = (record.sent_s - record.observed_s) * 1000
        assert age_ms <= self.bench.settings.max_action_age_ms
        due = self.model.due(record.sent_s)
        assert due is not None
        chunk, step = due
        assert (record.chunk, record.step) == (chunk.number, step)
        if self.bench.settings.mode == "receding":
            wanted = np.clip(chunk.actions[step], -1, 1)
            near = self.last is None or (np.abs(wanted - self.last) < self.bench.safety.max_step)
            assert np.array_equal(np.where(near, action, 0), np.where(near, wanted, 0))
        self.model.policy_s.append(record.sent_s)
        self.moved_s = record.sent_s

    def check_substitute(
        self, record: StepRecord, action: NDArray[np.float32], last: NDArray[np.float32]
    ) -> None:
        assert record.sent_s is not None
        assert action[2] == last[2], "the gripper is left as it is"
        assert abs(action[0]) <= max(0, abs(last[0]) - min(self.bench.safety.max_step[0], 1) + 1e-6)
        if record.state in (LoopState.HOLDING, LoopState.RAMPING):
            assert self.model.due(record.sent_s) is None, "there was something to do"
            if self.state is LoopState.RUNNING:
                assert record.state is LoopState.HOLDING
                self.held_since_s = record.sent_s
            held_ms = (record.sent_s - self.held_since_s) * 1000
            late = (
                held_ms >= self.bench.settings.hold_ms - 1e-3
                and self.state is not LoopState.RUNNING
            )
            assert record.state is (LoopState.RAMPING if late else LoopState.HOLDING)
            still = np.array([0, last[1], last[2]], np.float32)
            if not np.array_equal(action, still):
                self.model.displaced_s = record.sent_s
        if record.state is LoopState.HOLDING:
            assert action[1] == last[1]
        else:
            assert abs(action[1] - 0.25) <= abs(last[1] - 0.25), "towards the safe place"
        if record.state.terminal:
            assert action[:2].tolist() == [0.0, 0.25], "the safe action comes last"

    def teardown(self) -> None:
        if not hasattr(self, "bench"):
            return
        if self.running:
            self.it_stops_when_asked()
        counters, sent = self.bench.loop.counters, self.bench.robot.commands
        assert counters.sent + counters.held == len(sent)
        assert counters.sent == sum(command.observed_s is not None for command in sent)
        if sent:
            assert sent[-1].action[:2].tolist() == [0.0, 0.25]
        count = len(sent)
        assert self.bench.loop.state.terminal and len(self.bench.robot.commands) == count


ControlLoopMachine.TestCase.settings = hypothesis_settings(
    max_examples=80, stateful_step_count=50, deadline=None
)
TestControlLoop = ControlLoopMachine.TestCase
