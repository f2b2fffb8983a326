"""A robot, a camera and an engine in virtual time, for the tests of the control loop."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.control.chunks import TimedChunk
from jetson.control.inference import InferenceResult
from jetson.control.loop import ControlLoop
from jetson.control.loop_clock import SimulatedClock
from jetson.control.records import StepRecord
from jetson.control.safety import ActionSafety
from jetson.control.settings import LoopSettings
from jetson.control.sinks import Command
from jetson.control.sources import TimedObservation
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

# A displacement (stopped by 0), a position with a safe place, a gripper (left as it is).
HOLD = np.array([0, np.nan, np.nan], np.float32)
SAFE = np.array([np.nan, 0.25, np.nan], np.float32)
PICTURE = Observation({"image": np.zeros((4, 4, 3), np.uint8)}, "go")
FRAME_S = 0.02


def safety(max_step: float = np.inf) -> ActionSafety:
    one = np.ones(3, np.float32)
    return ActionSafety(-one, one, HOLD, SAFE, one * np.float32(max_step))


def settings(**changes: object) -> LoopSettings:
    values: dict[str, object] = {
        "rate_hz": 10,
        "max_action_age_ms": 1000,
        "max_observation_age_ms": 500,
        "execute": 4,
    }
    return LoopSettings(**{**values, **changes})  # type: ignore[arg-type]


@dataclass
class LoopClock(SimulatedClock):
    """Simulated time that can also be lost."""

    # Added to the next sleep: the machine was busy.
    oversleep_s: float = 0.0

    def sleep_until(self, deadline_s: float) -> None:
        super().sleep_until(deadline_s)
        self.time_s += self.oversleep_s
        self.oversleep_s = 0.0


@dataclass
class Camera:
    """Takes a frame every 20 ms."""

    clock: LoopClock
    stalled: bool = False
    lag_s: float = 0.0
    error: Exception | None = None
    is_over: bool = False
    # How long a look takes.
    slow_s: float = 0.0
    last: TimedObservation | None = None

    def read(self) -> TimedObservation | None:
        self.clock.time_s += self.slow_s
        if self.error is not None:
            raise self.error
        if not self.stalled:
            frame_s = np.floor(self.clock.time_s / FRAME_S) * FRAME_S - self.lag_s
            self.last = TimedObservation(PICTURE, float(frame_s))
        return self.last

    def close(self) -> None:
        pass


Behaviour = Callable[[int], NDArray[np.float32]]


@dataclass
class Engine:
    """Answers after a delay, with what a behaviour says or raises for the n-th request."""

    clock: LoopClock
    behaviour: Behaviour
    delay_s: float = 0.03
    # None while nothing is under way.
    ready_s: float | None = None
    requests: int = 0
    pending: TimedObservation | None = None

    @property
    def busy(self) -> bool:
        return self.pending is not None

    def request(self, observation: TimedObservation) -> None:
        assert not self.busy
        self.pending = observation
        self.ready_s = self.clock.time_s + self.delay_s

    def poll(self) -> InferenceResult | None:
        if self.pending is None or self.ready_s is None or self.clock.time_s < self.ready_s:
            return None
        observation, self.pending = self.pending, None
        infer_ms = self.delay_s * 1000
        try:
            actions = self.behaviour(self.requests)
        except Exception as error:
            return InferenceResult(observation, None, error, infer_ms)
        finally:
            self.requests += 1
        return InferenceResult(observation, ActionChunk(actions, actions), None, infer_ms)

    def close(self) -> None:
        pass


@dataclass
class Robot:
    """Remembers what it was told."""

    clock: LoopClock
    commands: list[Command] = field(default_factory=list)
    # How many of the next commands fail, and how long each takes.
    failures: int = 0
    slow_s: float = 0.0

    def send(self, command: Command) -> None:
        self.clock.time_s += self.slow_s
        if self.failures:
            self.failures -= 1
            raise OSError("the cable is out")
        self.commands.append(command)

    def close(self) -> None:
        pass


@dataclass
class Notes:
    """A recorder in memory."""

    observations: list[TimedObservation] = field(default_factory=list)
    chunks: list[TimedChunk] = field(default_factory=list)
    records: list[StepRecord] = field(default_factory=list)
    failure: str | None = None

    def on_observation(self, observation: TimedObservation) -> None:
        self.observations.append(observation)

    def on_chunk(self, chunk: TimedChunk) -> None:
        self.chunks.append(chunk)

    def on_step(self, record: StepRecord) -> None:
        self.records.append(record)

    def close(self) -> None:
        pass


def numbered(request: int, horizon: int = 8) -> NDArray[np.float32]:
    """Actions that say which request and which step they are of; within the limits."""
    actions = np.zeros((horizon, 3), np.float32)
    actions[:, 0] = (request % 50) / 100
    actions[:, 1] = np.arange(horizon) / 100
    actions[:, 2] = -1
    return actions


class Bench:
    """A loop with all its doubles."""

    def __init__(
        self,
        loop_settings: LoopSettings | None = None,
        action_safety: ActionSafety | None = None,
        behaviour: Behaviour = numbered,
        arm: Callable[[LoopClock], Any] | None = None,
        **engine: float,
    ) -> None:
        """Put them together; an arm is source and robot in one."""
        self.settings = loop_settings or settings()
        self.safety = action_safety or safety()
        self.clock = LoopClock(100.0)
        self.camera, self.robot = Camera(self.clock), Robot(self.clock)
        if arm is not None:
            self.camera = self.robot = arm(self.clock)
        self.engine, self.notes = Engine(self.clock, behaviour, **engine), Notes()
        self.loop = ControlLoop(
            self.camera,
            self.engine,
            self.robot,
            self.safety,
            self.settings,
            self.clock,
            self.notes,
        )

    def ticks(self, count: int) -> list[StepRecord]:
        return [self.loop.tick() for _ in range(count)]

    def finish(self) -> list[StepRecord]:
        """Ask for the end and return the records until then."""
        self.loop.stop("asked")
        records = []
        while not self.loop.state.terminal:
            records.append(self.loop.tick())
            assert len(records) < 1000
        return records
