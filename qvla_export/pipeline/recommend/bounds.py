"""The noun `Bound`: how much a setting may add to the action, in the robot's own units."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qvla_export.pipeline.recommend.open_loop import OpenLoopError
from qvla_export.shared.action_space import ActionLabels, ActionSpace, Group
from qvla_export.shared.errors import QvlaError

Quantile = Literal["median", "p90"]
# Of the float policy's own median error against the demonstrations.
SHARE = 0.1
_OPTIONS: dict[Group, str] = {
    "translation": "--tolerance-mm",
    "rotation": "--tolerance-deg",
    "joints": "--tolerance-deg",
    "gripper": "--tolerance-gripper",
}


@dataclass(frozen=True)
class Tolerance:
    """What a user allows quantization to add, and says of the action; None where not said.

    Raises:
        QvlaError: a number is not above zero.
    """

    # Of translations; of rotations and joints; of a gripper, in its own units.
    mm: float | None = None
    deg: float | None = None
    gripper: float | None = None
    # Names of the action's numbers, and what one of them is in millimetres or degrees.
    names: tuple[str, ...] = ()
    unit_mm: float | None = None
    unit_deg: float | None = None

    def __post_init__(self) -> None:
        numbers = {
            "--tolerance-mm": self.mm,
            "--tolerance-deg": self.deg,
            "--tolerance-gripper": self.gripper,
            "--unit-mm": self.unit_mm,
            "--unit-deg": self.unit_deg,
        }
        for option, value in numbers.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise QvlaError(f"{option} must be a number above 0, got {value:g}")

    @property
    def labels(self) -> ActionLabels:
        """Return what the user says of the action."""
        options = ["--action-names"] * bool(self.names)
        options += ["--unit-mm"] * (self.unit_mm is not None)
        options += ["--unit-deg"] * (self.unit_deg is not None)
        return ActionLabels(", ".join(options), self.names, self.unit_mm, self.unit_deg)

    def of(self, group: Group) -> float | None:
        """Return what is allowed in a group; None where nothing is said."""
        amounts: dict[Group, float | None] = {
            "translation": self.mm,
            "rotation": self.deg,
            "joints": self.deg,
            "gripper": self.gripper,
        }
        return amounts.get(group)


@dataclass(frozen=True)
class Bound:
    """The most that quantization may add in one group of the action's numbers."""

    group: Group
    # Of `value`: "mm", "deg", or "units".
    unit: str
    # None where it cannot be formed.
    value: float | None
    # Of what is added: the median beside a median, nine in ten actions of a stated tolerance.
    quantile: Quantile
    # Where it comes from, or why there is none, in words.
    source: str

    def allows(self, error: OpenLoopError) -> bool:
        """Whether a policy's errors stay under it."""
        return self.value is not None and self.added(error) <= self.value

    def added(self, error: OpenLoopError) -> float:
        """Return what a policy adds, as this bound counts it."""
        return error.groups[self.group].added(self.quantile)


def form_bounds(
    space: ActionSpace, float_error: OpenLoopError, tolerance: Tolerance, no_actions: str
) -> tuple[Bound, ...]:
    """Return a bound for each group of the action.

    Args:
        space: of the action.
        float_error: the float policy's, against the demonstrations.
        tolerance: takes the place of the default.
        no_actions: why there are no demonstrated actions, in words; empty where there are.
    """
    bounds = []
    for group in space.present():
        unit, _ = space.unit(group)
        stated, own = tolerance.of(group), float_error.groups[group].error
        if stated is not None:
            option = _OPTIONS[group]
            bounds.append(Bound(group, unit, stated, "p90", f"{option}, nine actions in ten"))
        elif own is not None:
            text = f"a tenth of the float policy's median error, {own.median:.3g} {unit}"
            bounds.append(Bound(group, unit, SHARE * own.median, "median", text))
        else:
            how = f"; state it with {_OPTIONS[group]}" if group in _OPTIONS else ""
            bounds.append(Bound(group, unit, None, "median", f"{no_actions}{how}"))
    return tuple(bounds)


def require_units(space: ActionSpace, tolerance: Tolerance) -> None:
    """Refuse a tolerance in a unit that nothing relates the action to.

    Raises:
        QvlaError: the action has no such numbers, or nothing says what one of them is.
    """
    said = f"the action's numbers are {', '.join(space.names)} ({space.names_source})"
    checks: Sequence[tuple[str, float | None, tuple[Group, ...], float | None, str, str]] = (
        ("--tolerance-mm", tolerance.mm, ("translation",), space.unit_mm, "--unit-mm", "mm"),
        (
            *("--tolerance-deg", tolerance.deg, ("rotation", "joints")),
            *(space.unit_deg, "--unit-deg", "degrees"),
        ),
        ("--tolerance-gripper", tolerance.gripper, ("gripper",), 1.0, "", ""),
    )
    for option, value, groups, unit, unit_option, words in checks:
        if value is None:
            continue
        if not set(groups) & set(space.groups):
            raise QvlaError(
                f"{option} bounds {' and '.join(groups)}, of which the action has none: {said}; "
                "name its numbers with --action-names, such as x,y,z,roll,pitch,yaw,gripper"
            )
        if unit is None:
            example = "1000 for metres, 50 for LIBERO's controller"
            example = example if unit_option == "--unit-mm" else "57.2958 for radians"
            raise QvlaError(
                f"{option} needs to know how many {words} one unit of the action is, and nothing "
                f"says it; state it with {unit_option} ({example})"
            )
