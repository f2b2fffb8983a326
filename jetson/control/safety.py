"""The noun `ActionSafety`: what a command must satisfy, and what holds the robot still."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.errors import RefusedSetting
from jetson.policy import UnsafeAction
from qvla_export.shared.normalization import Bounds

Vector = NDArray[np.float32]


@dataclass(frozen=True)
class AdmittedAction:
    """A command that may be sent."""

    # float32 [dim]
    action: Vector
    # Values that were cut to a limit or slowed to the largest step.
    clamped: int


@dataclass(frozen=True)
class ActionSafety:
    """Limits of every command, the action that holds the robot and the one that ends a run.

    What stops a robot depends on what its actions mean: a displacement or speed is stopped by 0,
    a position by the last command. `hold` says which, per dimension.

    Raises:
        RefusedSetting: shapes differ, limits are not finite and ordered, the hold or safe action
            is outside the limits, or a largest step is not positive.
    """

    # Lowest and highest value of each dimension, in the robot's units.  float32 [dim]
    low: Vector
    high: Vector
    # What holds the robot still; NaN for "the last command" (positions, grippers).  float32 [dim]
    hold: Vector
    # Where it is brought when it must not go on; NaN for "as when holding".  float32 [dim]
    safe: Vector
    # Largest change from one command to the next; infinity for any.  float32 [dim]
    max_step: Vector

    def __post_init__(self) -> None:
        shapes = {v.shape for v in (self.low, self.high, self.hold, self.safe, self.max_step)}
        if len(shapes) != 1 or len(next(iter(shapes))) != 1 or not self.low.size:
            raise RefusedSetting(f"limits, hold, safe action and steps differ in size: {shapes}")
        finite = np.isfinite(self.low).all() and np.isfinite(self.high).all()
        if not finite or (self.low > self.high).any():
            raise RefusedSetting(
                f"action limits must be finite and ordered, got low {self.low.tolist()} and "
                f"high {self.high.tolist()}"
            )
        for name, value in (("hold", self.hold), ("safe", self.safe)):
            # NaN compares false: "the last command" is always inside.
            outside = np.flatnonzero((value < self.low) | (value > self.high))
            if outside.size:
                raise RefusedSetting(
                    f"the {name} action must be inside the limits, dimensions {outside.tolist()} "
                    f"of {value.tolist()} are not in {self.low.tolist()}..{self.high.tolist()}"
                )
        # A smaller step would be lost in rounding, and the safe action never be reached.
        smallest = np.spacing(np.maximum(np.abs(self.low), np.abs(self.high)))
        if not (self.max_step > smallest).all():
            raise RefusedSetting(
                f"the largest step must be above 0 and what float32 can resolve "
                f"({smallest.tolist()}), got {self.max_step.tolist()}"
            )

    def admit(self, action: NDArray[Any], last: Vector | None) -> AdmittedAction:
        """Return the nearest command that may be sent after `last`.

        Raises:
            UnsafeAction: a value is NaN or infinite, or the number of dimensions is another.
        """
        if action.shape != self.low.shape or not np.isfinite(action).all():
            raise UnsafeAction(
                f"a command is {self.low.size} finite numbers, got {np.asarray(action).tolist()}"
            )
        with np.errstate(over="ignore"):  # what overflows float32 is cut like the rest
            wanted = action.astype(np.float32)
        admitted = self.limit_step(np.clip(wanted, self.low, self.high), last)
        return AdmittedAction(admitted, int((admitted != wanted).sum()))

    def limit_step(self, target: Vector, last: Vector | None) -> Vector:
        """Return the command nearest to the target within one largest step of the last one."""
        if last is None:
            return target
        with np.errstate(over="ignore"):  # limits near the end of float32
            change = target - last
        step = np.clip(change, -self.max_step, self.max_step)
        near = np.abs(change) <= self.max_step
        return np.clip(np.where(near, target, last + step), self.low, self.high)

    def hold_action(self, last: Vector) -> Vector:
        """Return the action that keeps the robot where it is.  float32 [dim]"""
        return np.where(np.isnan(self.hold), last, self.hold)

    def safe_action(self, last: Vector) -> Vector:
        """Return the action that ends a run, given the last command.  float32 [dim]"""
        return np.where(np.isnan(self.safe), self.hold_action(last), self.safe)


def action_safety(
    limits: Bounds,
    hold: NDArray[Any],
    safe: NDArray[Any] | None = None,
    max_step: NDArray[Any] | None = None,
) -> ActionSafety:
    """Return the safety of a policy's actions within its statistics' limits.

    Args:
        limits: `Statistics.action`: quantiles 1 % and 99 %, or minimum and maximum.
        hold: what holds the robot, NaN for the last command.  [dim]
        safe: what ends a run; by default, holding.  [dim]
        max_step: largest change a command; by default, any.  [dim]

    Raises:
        RefusedSetting: as `ActionSafety`.
    """
    low, high = limits.low.astype(np.float32), limits.high.astype(np.float32)
    # Rounding must not widen a limit.
    low = np.where(low < limits.low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > limits.high, np.nextafter(high, np.float32(-np.inf)), high)
    return ActionSafety(
        low=low,
        # A dimension that never moves keeps one value.
        high=np.where(limits.low == limits.high, low, high),
        hold=np.asarray(hold, np.float32),
        safe=np.full(low.shape, np.nan, np.float32) if safe is None else safe.astype(np.float32),
        max_step=(
            np.full(low.shape, np.inf, np.float32)
            if max_step is None
            else max_step.astype(np.float32)
        ),
    )
