"""The control loop: sends one safe command at each slot while the policy thinks beside it.

At slot k, due k periods after the start, the loop takes a finished chunk if there is one, sends
the action that is due, and then looks: the newest observation goes to the inference thread when
the next chunk will soon be needed. Slots are absolute, so no delay adds up; a slot that has
passed is skipped, never made up for. What is sent in which state is drawn in `states`.
"""

import logging
import math
from collections import deque
from collections.abc import Callable
from dataclasses import asdict

from jetson.control.chunks import ChunkBuffer, SentCommands, TimedChunk
from jetson.control.foresight import Foresight
from jetson.control.inference import Inference, InferenceResult
from jetson.control.loop_clock import LoopClock
from jetson.control.loop_state import LoopState
from jetson.control.observation_gate import DroppedObservation, ObservationGate
from jetson.control.records import Counters, Recorder, RunResult, StepRecord
from jetson.control.safety import ActionSafety
from jetson.control.settings import LoopSettings
from jetson.control.sinks import Command, Sink
from jetson.control.sources import Source
from jetson.control.supervisor import Decision, Supervisor
from jetson.errors import CommandNotTaken

_LOG = logging.getLogger(__name__)
# Inferences whose slowest says when the next chunk is asked for. Few, so that a slow first one
# is forgotten; and what is added to it.
_LATENCIES = 8
_LATENCY_MARGIN = 1.1
# By how much, in periods or seconds, floating point may miss a slot.
_EARLY = 1e-6


class ControlLoop:
    """One run of a policy on a robot. `tick` does one slot, `run` all of them."""

    def __init__(
        self,
        source: Source,
        inference: Inference,
        sink: Sink,
        safety: ActionSafety,
        settings: LoopSettings,
        clock: LoopClock,
        recorder: Recorder | None = None,
    ) -> None:
        self.counters = Counters()
        # Why the loop stops; empty until it is asked to.
        self.reason = ""
        self._source = source
        self._inference = inference
        self._sink = sink
        self._dimensions = safety.low.size
        self._settings = settings
        self._clock = clock
        self._recorder = recorder
        self._supervisor = Supervisor(safety, settings)
        self._chunks = ChunkBuffer(settings)
        self._chunk_count = 0
        self._sent = SentCommands(settings)
        self._foresight = Foresight(settings, self._chunks, self._sent, self._supervisor)
        self._infer_ms: deque[float] = deque(maxlen=_LATENCIES)
        self._start_s = clock.now_s()
        self._slot = 0
        # When the policy last moved the robot, or the start.
        self._moved_s = self._start_s
        # When the robot last took a command, or the start.
        self._taken_s = self._start_s
        # When it was first asked to stop.
        self._stopped_s = self._start_s
        self._gate = ObservationGate(settings.max_observation_age_ms)
        self._broken = False
        self._unreachable = False
        self._recorder_failed = False
        self._events: list[str] = []
        self._last_failure = ""

    @property
    def state(self) -> LoopState:
        """What the loop is doing."""
        return self._supervisor.state

    def run(self, seconds: float | None = None) -> RunResult:
        """Run until stopped, ended, broken or out of time; the last command is the safe action."""
        try:
            while not self.state.terminal:
                if seconds is not None and self._slot * self._settings.period_s >= seconds - _EARLY:
                    self.stop("the time is up")
                self.tick()
        except BaseException:
            # Not foreseen: whatever it is, the robot does not keep the policy's last command.
            self.stop("the loop itself failed", fault=True)
            while not self.state.terminal:
                self._clock.sleep_until(self._due_s())
                self._send(self._supervisor.finish(LoopState.FAULT))
                self._slot += 1
            raise
        finally:
            self._inference.close()
        seconds_run = self._clock.now_s() - self._start_s
        return RunResult(self.state, self.reason, asdict(self.counters), seconds_run)

    def stop(self, reason: str, fault: bool = False) -> None:
        """Ask for the end: from the next slot on, ramp to the safe action. For signal handlers."""
        if not self.reason:
            self._stopped_s = self._clock.now_s()
        self.reason = self.reason or reason
        self._broken = self._broken or fault

    def tick(self) -> StepRecord:
        """Wait for the next slot, send what is due there, look; return what happened."""
        self._clock.sleep_until(self._due_s())
        self._skip_passed_slots()
        arrived = self._take_chunk()
        now_s = self._clock.now_s()
        self._stop_if_over(now_s)
        decision = self._decide(now_s)
        sent_s = self._send(decision)
        if not self.reason:
            self._look()
        record = self._record_of(decision, sent_s, arrived)
        self._record(lambda recorder: recorder.on_step(record))
        self._slot += 1
        return record

    def _due_s(self) -> float:
        return self._start_s + self._slot * self._settings.period_s

    def _skip_passed_slots(self) -> None:
        elapsed_s = self._clock.now_s() - self._start_s
        reached = math.floor(elapsed_s / self._settings.period_s + _EARLY)
        if reached > self._slot:
            self.counters.skipped_slots += reached - self._slot
            self._slot = reached

    def _take_chunk(self) -> InferenceResult | None:
        """Take a finished inference into the buffer, if it is of any use."""
        arrived = self._inference.poll()
        if arrived is None:
            return None
        self._infer_ms.append(arrived.infer_ms)
        try:
            actions = arrived.checked_actions(self._dimensions)
        except Exception as error:
            # Whatever else an engine that fails has said is not trusted either.
            self._chunks.clear()
            self._fail("inference", error)
            return arrived
        observed_s = arrived.observation.observed_s
        spans = arrived.chunk.timing_ms if arrived.chunk else {}
        capture_ms = self._gate.capture_ms
        timing_ms = {"capture": capture_ms, **spans, "total": capture_ms + arrived.infer_ms}
        first = self._foresight.first_command
        chunk = TimedChunk(self._chunk_count, actions, observed_s, first, timing_ms)
        self._chunk_count += 1
        self._record(lambda recorder: recorder.on_chunk(chunk))
        # A ramp has taken the robot away from where an older observation saw it.
        displaced = observed_s < self._supervisor.displaced_s
        usable = self._chunks.usable(chunk, self._sent.count, self._clock.now_s())
        if usable and not displaced:
            self._chunks.add(chunk)
        else:
            self._note_stale(chunk, "is stale")
        return arrived

    def _note_stale(self, chunk: TimedChunk, why: str) -> None:
        self.counters.stale_chunks += 1
        self._events.append(f"chunk {chunk.number} {why}")

    def _stop_if_over(self, now_s: float) -> None:
        if self.reason:
            return
        if self._source.is_over:
            self.stop("the source has ended")
        elif now_s - self._moved_s >= self._settings.give_up_s:
            blocked = self._taken_s <= self._moved_s and self.counters.dropped_commands
            what = "the driver has taken no command" if blocked else "no usable action"
            self.stop(f"{what} for {self._settings.give_up_s:g} s", fault=True)
            self.counters.faults += 1
        if self.reason:
            self._events.append(self.reason)

    def _decide(self, now_s: float) -> Decision:
        if self.reason:
            return self._supervisor.finish(LoopState.FAULT if self._broken else LoopState.STOPPED)
        for chunk in self._chunks.drop_unreached(self._sent.count, now_s):
            self._note_stale(chunk, "was made for where the robot did not get to")
        planned = self._chunks.plan(self._sent.count, now_s, self._supervisor.last)
        if planned is None and self._supervisor.has_started:
            self.counters.missed_deadlines += 1
        return self._supervisor.proceed(planned, now_s)

    def _send(self, decision: Decision) -> float | None:
        """Send a decision; return when, or None if nothing reached the robot."""
        if decision.action is None:
            return None
        # Again: the process may have been stopped since the decision.
        now_s = self._clock.now_s()
        planned = decision.planned
        if planned and now_s > self._deadline_s(planned.observed_s):
            self._supervisor.take_back()
            self._events.append("an action became too old between decision and sending")
            return None
        observed_s = planned.observed_s if planned else None
        command = Command(
            slot=self._slot,
            action=decision.action,
            sent_s=now_s,
            observed_s=observed_s,
            state=self.state.value,
            deadline_s=self._deadline_s(now_s if observed_s is None else observed_s),
        )
        try:
            self._sink.send(command)
        except CommandNotTaken as error:
            self._drop(error, now_s)
            return None
        except Exception as error:
            self._fail("robot", error)
            self.stop(f"the robot cannot be reached: {error}", fault=True)
            # One more try to leave it with the safe action; not a second one.
            if self._unreachable or self.state.terminal:
                self._supervisor.abandon()
            self._unreachable = True
            return None
        self._taken_s = now_s
        self._sent.add(decision.action, now_s, planned is not None)
        if planned is None:
            self.counters.held += 1
        else:
            self.counters.sent += 1
            self.counters.clamped_values += decision.clamped
            self._moved_s = now_s
        return now_s

    def _deadline_s(self, from_s: float) -> float:
        return from_s + self._settings.max_action_age_ms / 1000.0

    def _drop(self, error: CommandNotTaken, now_s: float) -> None:
        """Note that the robot is where it was; end when it takes nothing for too long."""
        self._supervisor.take_back()
        self.counters.dropped_commands += 1
        self._events.append(str(error))
        waited_s = now_s - max(self._taken_s, self._stopped_s)
        if self.reason and waited_s >= self._settings.give_up_s:
            self._fail("robot", error)
            self._supervisor.abandon()

    def _look(self) -> None:
        """Ask about the newest observation if the next chunk will soon be needed."""
        now_s = self._clock.now_s()
        if self._inference.busy or not self._chunks.next_due(self._sent.count, now_s, self._lead):
            return
        try:
            seen = self._gate.admit(self._source.read(), self._clock.now_s())
            shown = None if seen is None else self._foresight.show(seen, self._lead, now_s)
        except DroppedObservation as dropped:
            self.counters.dropped_observations += 1
            self._events.append(str(dropped))
            return
        except Exception as error:
            self._fail("source", error)
            return
        if shown is not None:
            self._record(lambda recorder: recorder.on_observation(shown))
            self._inference.request(shown)

    @property
    def _lead(self) -> int:
        """Commands that will be sent while the next chunk is computed."""
        slowest_s = max(self._infer_ms, default=0.0) / 1000.0 * _LATENCY_MARGIN
        return max(0, math.ceil(slowest_s / self._settings.period_s) - 1)

    def _fail(self, what: str, error: Exception) -> None:
        self.counters.faults += 1
        failure = f"{what}: {type(error).__name__}: {error}"
        self._events.append(failure)
        # A camera that is unplugged fails at every slot; once is enough for a log.
        if failure != self._last_failure:
            _LOG.warning("%s", failure)
        self._last_failure = failure

    def _record_of(
        self, decision: Decision, sent_s: float | None, arrived: InferenceResult | None
    ) -> StepRecord:
        planned, action = decision.planned, decision.action
        events = tuple(self._events)
        self._events.clear()
        return StepRecord(
            slot=self._slot,
            due_s=self._due_s(),
            sent_s=sent_s,
            state=self.state,
            action=None if sent_s is None or action is None else tuple(action.tolist()),
            observed_s=planned.observed_s if planned else None,
            chunk=planned.chunk if planned else None,
            step=planned.step if planned else None,
            clamped=decision.clamped,
            infer_ms=arrived.infer_ms if arrived else None,
            events=events,
        )

    def _record(self, keep: Callable[[Recorder], None]) -> None:
        if self._recorder is None:
            return
        try:
            keep(self._recorder)
        except Exception as error:
            # A full disk must not stop a robot in the middle of a movement; it is one failure.
            if not self._recorder_failed:
                self._fail("recorder, the rest is not recorded", error)
            self._recorder_failed = True
