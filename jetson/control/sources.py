"""Where observations come from; every one carries the monotonic time at which it was taken."""

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from jetson.control.loop_clock import LoopClock
from jetson.control.sinks import Command
from jetson.errors import RefusedSetting
from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class TimedObservation:
    """An observation and when it was taken."""

    observation: Observation
    # Monotonic seconds of the loop's clock.
    observed_s: float


class Source(Protocol):
    """Where the loop looks. Called from the control thread: must not wait for a camera."""

    def read(self) -> TimedObservation | None:
        """Return the newest observation; None before the first."""
        ...

    @property
    def is_over(self) -> bool:
        """Whether there is nothing more to do."""
        ...

    def close(self) -> None:
        """Release devices and threads."""
        ...


class PushedSource:
    """Observations that somebody else brings: a remote client, a ROS callback, a test."""

    def __init__(self, clock: LoopClock) -> None:
        self._clock = clock
        self._newest: TimedObservation | None = None
        self._ended = False
        self._lock = threading.Lock()

    def push(self, observation: Observation, observed_s: float | None = None) -> None:
        """Replace the newest observation, unless it is newer; any thread may call this.

        Args:
            observation: what was seen.
            observed_s: when, in seconds of the loop's clock; by default now. A moment in the
                future is taken for now: no clock may make an old picture look fresh.
        """
        now_s = self._clock.now_s()
        moment_s = now_s if observed_s is None else min(observed_s, now_s)
        with self._lock:
            before_s = -math.inf if self._newest is None else self._newest.observed_s
            # Whatever is no time is told by the gate once, and makes room for what is one.
            if self._newest is None or not math.isfinite(before_s) or moment_s > before_s:
                self._newest = TimedObservation(observation, moment_s)

    def end(self) -> None:
        """Say that nothing more will come."""
        self._ended = True

    def read(self) -> TimedObservation | None:
        """Return the newest observation."""
        with self._lock:
            return self._newest

    @property
    def is_over(self) -> bool:
        """Whether `end` was called."""
        return self._ended

    def close(self) -> None:
        """Do nothing: nothing is open."""


class EpisodeSource:
    """A recorded episode, played at the speed at which it was recorded."""

    def __init__(
        self,
        timestamps_s: Sequence[float],
        load: Callable[[int], Observation],
        clock: LoopClock,
        instruction: str | None = None,
    ) -> None:
        """Start with the first `read`.

        Args:
            timestamps_s: of each frame since the episode's start, ascending.
            load: returns a frame's observation; called for frames that are looked at only.
            clock: of the loop.
            instruction: replaces the recorded one.

        Raises:
            RefusedSetting: there is no frame, or the timestamps do not ascend.
        """
        if not timestamps_s or any(np.diff(timestamps_s) <= 0):
            raise RefusedSetting(
                f"an episode needs frames with ascending timestamps, got {list(timestamps_s)[:8]}"
            )
        self._timestamps_s = np.asarray(timestamps_s, np.float64) - timestamps_s[0]
        self._load = load
        self._clock = clock
        self._instruction = instruction
        self._start_s: float | None = None
        self._read: tuple[int, TimedObservation] | None = None

    def read(self) -> TimedObservation | None:
        """Return the frame that is current now, taken when it was recorded."""
        if self._start_s is None:
            self._start_s = self._clock.now_s()
        elapsed_s = self._clock.now_s() - self._start_s
        frame = int(np.searchsorted(self._timestamps_s, elapsed_s + 1e-9, side="right")) - 1
        if self._read is None or self._read[0] != frame:
            observation = self._load(frame)
            if self._instruction is not None:
                observation = replace(observation, instruction=self._instruction)
            observed_s = self._start_s + float(self._timestamps_s[frame])
            self._read = frame, TimedObservation(observation, observed_s)
        return self._read[1]

    @property
    def is_over(self) -> bool:
        """Whether the last frame is past."""
        if self._start_s is None:
            return False
        return self._clock.now_s() - self._start_s > float(self._timestamps_s[-1])

    def close(self) -> None:
        """Do nothing: the data set is the caller's."""


class Steppable(Protocol):
    """A simulator that is reset: `calibration.benchmarks.metaworld.simulator.Simulator`."""

    # Whether the task was solved at any moment.
    success: bool

    @property
    def done(self) -> bool:
        """Whether the episode is solved or out of steps."""
        ...

    def observe(self) -> Observation:
        """Return what the policy sees now."""
        ...

    def step(self, action: NDArray[np.float32]) -> Any:
        """Apply one action for one control step."""
        ...


class SimulatedRobot:
    """A simulator as source and robot in one: each command is one control step."""

    def __init__(self, simulator: Steppable, clock: LoopClock) -> None:
        self._simulator = simulator
        self._clock = clock

    def read(self) -> TimedObservation:
        """Render the scene as it is now."""
        return TimedObservation(self._simulator.observe(), self._clock.now_s())

    def send(self, command: Command) -> None:
        """Advance the simulator by one control step."""
        self._simulator.step(command.action)

    @property
    def is_over(self) -> bool:
        """Whether the episode is solved or out of steps."""
        return self._simulator.done

    @property
    def solved(self) -> bool:
        """Whether the task was solved at any moment."""
        return self._simulator.success

    def close(self) -> None:
        """Do nothing: the simulator is the caller's."""
