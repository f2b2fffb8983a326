"""The state machine: from what the policy wants, or does not, to what is sent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jetson.control.chunks import PlannedAction
from jetson.control.loop_state import LoopState
from jetson.control.safety import ActionSafety, AdmittedAction, Vector
from jetson.control.settings import LoopSettings

# By how much a moment may be reached early in floating point.
_EARLY_MS = 1e-3


@dataclass(frozen=True)
class Decision:
    """What is sent at one slot."""

    # float32 [dim]; None for nothing.
    action: Vector | None
    # What the policy wanted, where the action comes from it.
    planned: PlannedAction | None = None
    # Values of that which were changed.
    clamped: int = 0


class Supervisor:
    """Knows the state and the last command; every command passes through it."""

    def __init__(self, safety: ActionSafety, settings: LoopSettings) -> None:
        self.state = LoopState.STARTING
        # When the robot was last moved otherwise than by the policy, monotonic seconds.
        self.displaced_s = -math.inf
        self._safety = safety
        self._settings = settings
        self._last: Vector | None = None
        # Since when there has been no usable action.
        self._missed_s = 0.0
        self._ramp_left = settings.ramp_steps
        self._before = self._progress

    @property
    def has_started(self) -> bool:
        """Whether a command was ever decided on."""
        return self._last is not None

    @property
    def last(self) -> Vector | None:
        """The last command; None before the first.  float32 [dim]"""
        return self._last

    def proceed(self, planned: PlannedAction | None, now_s: float) -> Decision:
        """Return what to send: the policy's action, or what holds or ramps without one."""
        self._before = self._progress
        if planned is not None:
            admitted = self._safety.admit(planned.action, self._last)
            self.state = LoopState.RUNNING
            self._ramp_left = self._settings.ramp_steps
            return self._remember(admitted, planned)
        if self._last is None:
            return Decision(None)
        if self.state is LoopState.RUNNING:
            self._missed_s = now_s
            self.state = LoopState.HOLDING
        elif (now_s - self._missed_s) * 1000.0 >= self._settings.hold_ms - _EARLY_MS:
            self.state = LoopState.RAMPING
        still = self._safety.hold_action(self._last)
        if self.state is LoopState.RAMPING:
            action = self._ramp(self._last)
        else:
            action = self._safety.limit_step(still, self._last)
        if not np.array_equal(action, still):
            self.displaced_s = now_s
        return self._remember(AdmittedAction(action, 0))

    def finish(self, end: LoopState) -> Decision:
        """Return the next command of the way to the safe action; the last one enters `end`."""
        self._before = self._progress
        if self._last is None:
            self.state = end
            return Decision(None)
        target = self._safety.safe_action(self._last)
        action = self._ramp(self._last)
        self.state = end if np.array_equal(action, target) else LoopState.STOPPING
        return self._remember(AdmittedAction(action, 0))

    def foresee(self, actions: Sequence[Vector], count: int) -> list[Vector]:
        """Return the next commands, so many, should the policy want these and then nothing.

        Empty before the first command: a robot that was never moved stands.
        """
        last, commands = self._last, []
        for action in actions:
            last = self._safety.admit(action, last).action
            commands.append(last)
        while last is not None and len(commands) < count:
            last = self._safety.limit_step(self._safety.hold_action(last), last)
            commands.append(last)
        return commands

    def take_back(self) -> None:
        """Forget the last decision: the robot did not take it, and is where it was.

        The next command is then within one step of the last one that the robot has, and no part
        of a ramp is left out.
        """
        self._last, self._ramp_left, self.displaced_s = self._before
        if self.state.terminal:
            self.state = LoopState.STOPPING

    @property
    def _progress(self) -> tuple[Vector | None, int, float]:
        return self._last, self._ramp_left, self.displaced_s

    def abandon(self) -> None:
        """Enter FAULT at once: the robot cannot be reached any more."""
        self.state = LoopState.FAULT

    def _ramp(self, last: Vector) -> Vector:
        """One step of a straight line to the safe action.

        It starts from standing still: a displacement is dropped at once, not faded out.
        """
        still, target = self._safety.hold_action(last), self._safety.safe_action(last)
        left, self._ramp_left = self._ramp_left, max(1, self._ramp_left - 1)
        wanted = target if left == 1 else still + (target - still) / np.float32(left)
        return self._safety.limit_step(wanted, last)

    def _remember(self, admitted: AdmittedAction, planned: PlannedAction | None = None) -> Decision:
        self._last = admitted.action
        return Decision(admitted.action, planned, admitted.clamped)
