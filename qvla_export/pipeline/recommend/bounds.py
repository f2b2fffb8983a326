"""The noun `Bound`: how much a setting may add to the action, in the robot's own units."""

from dataclasses import dataclass
from typing import Literal

from qvla_export.pipeline.recommend.open_loop import OpenLoopError
from qvla_export.pipeline.recommend.tolerance import Tolerance
from qvla_export.shared.action_space import ActionSpace, Group
from qvla_export.shared.errors import QvlaError

Quantile = Literal["median", "p90"]
# Of the float policy's own median error against the demonstrations.
SHARE = 0.1
_COUNTED: dict[Quantile, str] = {"median": "at the median", "p90": "in nine actions of ten"}
_OPTIONS: dict[Group, str] = {
    "translation": "--tolerance-mm",
    "rotation": "--tolerance-deg",
    "joints": "--tolerance-deg",
    "gripper": "--tolerance-gripper",
}
_STATE_MM = "state its millimetres with --unit-mm (1000 for metres, 50 for LIBERO's controller)"
_STATE_DEG = "state its degrees with --unit-deg (57.2958 for radians)"


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

    @property
    def text(self) -> str:
        """Return it as a sentence, with where it comes from."""
        if self.value is None:
            return f"{self.group}: no bound, {self.source}"
        counted = _COUNTED[self.quantile]
        return f"{self.group}: at most {self.value:.3g} {self.unit} added {counted} ({self.source})"

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
    own = f"the action's numbers are {', '.join(space.names)} ({space.names_source})"
    bounded: dict[str, list[Group]] = {}
    for group, option in _OPTIONS.items():
        if tolerance.of(group) is not None:
            bounded.setdefault(option, []).append(group)
    for option, groups in bounded.items():
        if not set(groups) & set(space.groups):
            raise QvlaError(
                f"{option} bounds {' and '.join(groups)}, of which the action has none: {own}; "
                "name its numbers with --action-names, such as x,y,z,roll,pitch,yaw,gripper"
            )
    for option, unit, remedy in (
        ("--tolerance-mm", space.unit_mm, _STATE_MM),
        ("--tolerance-deg", space.unit_deg, _STATE_DEG),
    ):
        if option in bounded and unit is None:
            raise QvlaError(f"{option}: nothing says how much one unit of the action is; {remedy}")
