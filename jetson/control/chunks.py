"""Which action of which chunk belongs to the next command: receding horizon and ensembling.

A chunk says what to do from its observation on. While it was being computed the robot executed
commands of an older one, so its first actions are past: the step that is due is the number of
policy commands sent since the observation. Counting commands, not seconds, matters where the
robot stood still meanwhile: nothing is skipped then, and it does not jump into the middle of a
movement (lerobot PR #4223).

With roll-forward a chunk begins at a command that was foreseen, and the one before it goes on until
then. It was planned for where the robot would be: where the commands in between never came, it is
dropped.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from jetson.control.settings import LoopSettings
from qvla_export.shared.motion.seams import faded, steps_of

Vector = NDArray[np.float32]


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
        self._chunks.append(chunk)
        self._first_use = None

    def clear(self) -> None:
        """Forget all chunks."""
        self._chunks.clear()

    def usable(self, chunk: TimedChunk, command: int, now_s: float) -> bool:
        """Say whether a chunk covers that command, or begins later, and is young enough."""
        young = (now_s - chunk.observed_s) * 1000.0 <= self._settings.max_action_age_ms
        return command - chunk.first_command < len(chunk.actions) and young

    def drop_unreached(self, command: int, now_s: float) -> list[TimedChunk]:
        """Drop chunks that begin later where none leads there; return them."""
        if self._speaking(command, now_s):
            return []
        unreached = [c for c in self._chunks if self.usable(c, command, now_s)]
        self._chunks = []
        return unreached

    def plan(self, command: int, now_s: float, last: Vector | None = None) -> PlannedAction | None:
        """Return what to do as that command; None if no chunk says anything about it.

        Args:
            command: its number.
            now_s: the loop's clock.
            last: the command before it, which a new chunk fades from; None before the first.
        """
        self._chunks = [c for c in self._chunks if self.usable(c, command, now_s)]
        spoken = self._speaking(command, now_s)
        if not spoken:
            return None
        newest = spoken[-1]
        if self._settings.mode == "receding":
            self._chunks = [c for c in self._chunks if c.number >= newest.number]
        if self._first_use is None and newest is self._chunks[-1]:
            self._first_use = command
            if self._settings.seam_limit is not None and last is not None:
                self._chunks = spoken = [self._faded(newest, command, last)]
        oldest_s = min(c.observed_s for c in spoken)
        step = command - newest.first_command
        return PlannedAction(self._action(spoken, command), oldest_s, newest.number, step)

    def coming(self, command: int, count: int, now_s: float) -> list[NDArray[np.float32]]:
        """Return what will be done from that command on, so many commands or as far as it goes."""
        actions: list[NDArray[np.float32]] = []
        for ahead in range(count):
            due_s = now_s + (ahead + 1) * self._settings.period_s
            spoken = self._speaking(command + ahead, due_s)
            if not spoken:
                break
            actions.append(self._action(spoken, command + ahead))
        return actions

    def next_due(self, command: int, now_s: float, lead: int) -> bool:
        """Say whether to ask for the next chunk now, `lead` commands before it is needed."""
        if self._settings.mode == "ensemble" or not self._chunks:
            return True
        newest = self._chunks[-1]
        if not self.usable(newest, command, now_s):
            return True
        if newest.first_command > command:
            return False
        used = 0 if self._first_use is None else command - self._first_use
        left = newest.first_command + len(newest.actions) - command
        return used >= self._settings.execute - lead or left <= lead

    def _faded(self, chunk: TimedChunk, command: int, last: Vector) -> TimedChunk:
        """Return a chunk whose actions from that command on fade from the last command."""
        limit, actions = self._settings.seam_limit, chunk.actions.copy()
        assert limit is not None
        left = actions[command - chunk.first_command :]
        gap = np.where(np.isinf(limit), 0.0, last - left[0])
        left[:] = faded(left, gap, steps_of(gap, limit))
        return replace(chunk, actions=actions)

    def _speaking(self, command: int, now_s: float) -> list[TimedChunk]:
        """Return the chunks that say what to do as that command, in the order of their arrival."""
        spoken = [
            chunk
            for chunk in self._chunks
            if chunk.first_command <= command and self.usable(chunk, command, now_s)
        ]
        return spoken[-1:] if self._settings.mode == "receding" else spoken

    def _action(self, spoken: Sequence[TimedChunk], command: int) -> NDArray[np.float32]:
        actions = np.stack([c.actions[command - c.first_command] for c in spoken])
        return actions[0] if len(actions) == 1 else self._ensemble(actions)

    def _ensemble(self, actions: NDArray[np.float32]) -> NDArray[np.float32]:
        """Weigh by age, so that movements stay smooth; see `ensemble_decay`."""
        weights = np.exp(-self._settings.ensemble_decay * np.arange(len(actions)))
        mean: NDArray[np.float32] = (weights @ actions / weights.sum()).astype(np.float32)
        return mean


class SentCommands:
    """The commands that the robot took, as far back as an observation may be old."""

    def __init__(self, settings: LoopSettings) -> None:
        keep = math.ceil(settings.max_action_age_ms / 1000.0 * settings.rate_hz) + 2
        if settings.response is not None:
            keep += settings.response.memory
        # Those that came of the policy, from the start.
        self.count = 0
        # When each was sent, whether it came of the policy, and the command itself.
        self._sent: deque[tuple[float, bool, Vector]] = deque(maxlen=keep)

    def add(self, command: Vector, now_s: float, planned: bool) -> None:
        """Note one command: of the policy, or what held or ramped the robot."""
        self.count += planned
        self._sent.append((now_s, planned, command))

    def count_before(self, moment_s: float) -> int:
        """Return how many commands of the policy had been sent by that moment."""
        return self.count - sum(planned for sent_s, planned, _ in self._sent if sent_s > moment_s)

    def around(self, moment_s: float) -> tuple[list[Vector], list[Vector]]:
        """Return the commands sent by that moment, and those sent since."""
        before = [command for sent_s, _, command in self._sent if sent_s <= moment_s]
        return before, [command for _, _, command in list(self._sent)[len(before) :]]
