"""The noun `OpenLoopError`: how far actions are from the demonstrated ones, group by group."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.action_space import ActionSpace, Group

# A gripper that is sent this far elsewhere, normalized (its range is 2), does something else.
_FLIP = 0.5


@dataclass(frozen=True)
class Quantiles:
    """The median and nine in ten of something."""

    median: float
    p90: float


@dataclass(frozen=True)
class GroupError:
    """One group of an action's numbers, over all held-out observations and steps of a chunk."""

    # "mm", "deg", or "units" where nothing says what a number is.
    unit: str
    # Distance from the float policy's actions.
    shift: Quantiles
    # Distance from the demonstrated actions; None where none were recorded.
    error: Quantiles | None
    # What the error exceeds the float policy's by; None where none were recorded.
    growth: Quantiles | None
    # Share of steps in which the gripper is moved by a quarter of its range; None for others.
    flips: float | None = None

    def added(self, quantile: str) -> float:
        """Return what quantization adds, at "median" or "p90": never below the shift.

        The distance from the float policy's actions bounds what an action can lose against any
        demonstration; where errors against them grow by more at this quantile, it is that.
        """
        shift: float = getattr(self.shift, quantile)
        return shift if self.growth is None else max(shift, getattr(self.growth, quantile))


@dataclass(frozen=True)
class OpenLoopError:
    """Errors of one policy on the held-out observations."""

    groups: Mapping[Group, GroupError]
    # Steps compared with the float policy, and with demonstrations.
    steps: int
    demonstrated_steps: int

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "steps": self.steps,
            "demonstrated_steps": self.demonstrated_steps,
            "groups": {group: asdict(error) for group, error in self.groups.items()},
        }


@dataclass(frozen=True)
class Actions:
    """What is compared, in the action's own units."""

    # float64 [n, horizon, dim]
    float_policy: NDArray[np.float64]
    # NaN where nothing was demonstrated; None where nothing was recorded at all.
    demonstrated: NDArray[np.float64] | None
    # One normalized unit, `Bounds.scale()`.  float64 [dim]
    scale: NDArray[np.float64]


def open_loop_error(
    space: ActionSpace, actions: Actions, candidate: NDArray[np.float64]
) -> OpenLoopError:
    """Return the errors of a policy's actions [n, horizon, dim], in the action's own units."""
    judged = _demonstrated_steps(actions.demonstrated)
    groups: dict[Group, GroupError] = {}
    for group in space.present():
        shift = _quantiles(space.differences(group, candidate, actions.float_policy))
        error = growth = None
        if actions.demonstrated is not None and judged is not None and judged.any():
            target = actions.demonstrated[judged]
            error, own = (
                _quantiles(space.differences(group, made[judged], target))
                for made in (candidate, actions.float_policy)
            )
            growth = Quantiles(error.median - own.median, error.p90 - own.p90)
        flips = _flips(space, actions, candidate) if group == "gripper" else None
        groups[group] = GroupError(space.unit(group)[0], shift, error, growth, flips)
    count = 0 if judged is None else int(judged.sum())
    return OpenLoopError(groups, candidate.shape[0] * candidate.shape[1], count)


def groups_no_better_than_a_constant(space: ActionSpace, actions: Actions) -> tuple[Group, ...]:
    """Return the groups in which the float policy predicts demonstrations worse than a constant.

    There it was not trained on what was recorded: another frame, unit, or sign of the gripper.
    """
    judged = _demonstrated_steps(actions.demonstrated)
    if actions.demonstrated is None or judged is None or not judged.any():
        return ()
    target = actions.demonstrated[judged]
    constant = np.broadcast_to(np.median(target, axis=0), target.shape)
    strange: list[Group] = []
    for group in space.present():
        own = space.differences(group, actions.float_policy[judged], target).mean()
        simple = space.differences(group, constant, target).mean()
        # Where hardly anything moves, a constant is right and a good policy nearly so.
        places = space.members(group)
        small = space.unit(group)[1] * 0.1 * actions.scale[places].max()
        if own > max(simple, small):
            strange.append(group)
    return tuple(strange)


def _demonstrated_steps(actions: NDArray[np.float64] | None) -> NDArray[np.bool_] | None:
    return None if actions is None else np.asarray(np.isfinite(actions).all(axis=-1))


def _quantiles(values: NDArray[np.float64]) -> Quantiles:
    median, p90 = np.quantile(values, (0.5, 0.9))
    return Quantiles(float(median), float(p90))


def _flips(space: ActionSpace, actions: Actions, candidate: NDArray[np.float64]) -> float:
    places = space.members("gripper")
    apart = np.abs(candidate - actions.float_policy)[..., places] / actions.scale[places]
    return float((apart >= _FLIP).any(axis=-1).mean())
