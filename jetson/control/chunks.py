"""Which action of which chunk belongs to the next command: receding horizon and ensembling.

A chunk says what to do from its observation on. While it was being computed the robot executed
commands of an older one, so its first actions are past: the step that is due is the number of
policy commands sent since the observation. Counting commands, not seconds, matters where the
robot stood still meanwhile: nothing is skipped then, and it does not jump into the middle of a
movement (lerobot PR #4223).
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from jetson.control.settings import LoopSettings


@dataclass(frozen=True)
class TimedChunk:
    """The actions that came of one observation."""

    # Chunks are numbered in the order of their arrival.
    number: int
    # float32 [horizon, dim]
    actions: NDArray[np.float32]
    # When the observation was taken, monotonic seconds.
    observed_s: float
    # Number of the policy command that its first action would be.
    first_command: int
    # Span -> milliseconds: "capture" is the observation's age when the policy was asked, "total"
    # that and the whole inference.
    timing_ms: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedAction:
    """What the policy wants to be done at one slot."""

    # float32 [dim]
    action: NDArray[np.float32]
    # When the oldest observation behind it was taken, monotonic seconds.
    observed_s: float
    # Newest chunk behind it, and which of its actions this is.
    chunk: int
    step: int


class ChunkBuffer:
    """The chunks that still have something to say."""

    def __init__(self, settings: LoopSettings) -> None:
        self._settings = settings
        self._chunks: list[TimedChunk] = []
        # Number of the command for which the newest chunk was first used; None before.
        self._first_use: int | None = None

    def add(self, chunk: TimedChunk) -> None:
        """Take a chunk that is newer than all before."""
        if self._settings.mode == "receding":
            self._chunks.clear()
        self._chunks.append(chunk)
        self._first_use = None

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()

    def usable(self, chunk: TimedChunk, command: int, now_s: float) -> bool:
        """Say whether a chunk covers that command and is young enough to be obeyed."""
        step = command - chunk.first_command
        young = (now_s - chunk.observed_s) * 1000.0 <= self._settings.max_action_age_ms
        return 0 <= step < len(chunk.actions) and young

    def plan(self, command: int, now_s: float) -> PlannedAction | None:
        """Return what to do as that command; None if no chunk says anything about it."""
        self._chunks = [c for c in self._chunks if self.usable(c, command, now_s)]
        if not self._chunks:
            return None
        if self._first_use is None:
            self._first_use = command
        newest = self._chunks[-1]
        actions = np.stack([c.actions[command - c.first_command] for c in self._chunks])
        action = actions[0] if len(actions) == 1 else self._ensemble(actions)
        oldest_s = min(c.observed_s for c in self._chunks)
        return PlannedAction(action, oldest_s, newest.number, command - newest.first_command)

    def next_due(self, command: int, now_s: float, lead: int) -> bool:
        """Say whether to ask for the next chunk now, `lead` commands before it is needed."""
        if self._settings.mode == "ensemble" or not self._chunks:
            return True
        newest = self._chunks[-1]
        if not self.usable(newest, command, now_s):
            return True
        used = 0 if self._first_use is None else command - self._first_use
        left = newest.first_command + len(newest.actions) - command
        return used >= self._settings.execute - lead or left <= lead

    def _ensemble(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weigh by age, so that movements stay smooth; see `ensemble_decay`."""
        weights = np.exp(-self._settings.ensemble_decay * np.arange(len(actions)))
        mean: NDArray[np.float32] = (weights @ actions / weights.sum()).astype(np.float32)
        return mean


class CommandTimes:
    """When the policy's commands were sent, as far back as an observation may be old."""

    def __init__(self, keep: int) -> None:
        self.count = 0
        self._times: deque[float] = deque(maxlen=keep)

    def add(self, now_s: float) -> None:
        """Note one command."""
        self.count += 1
        self._times.append(now_s)

    def count_before(self, moment_s: float) -> int:
        """Return how many commands had been sent by that moment."""
        return self.count - sum(time_s > moment_s for time_s in self._times)
