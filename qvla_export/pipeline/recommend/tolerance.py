"""The noun `Tolerance`: what a user allows quantization to add. Light: the command's options."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.shared.action_space import ActionLabels, Group


@dataclass(frozen=True)
class Tolerance:
    """What a user allows quantization to add, and says of the action; None where not said.

    Raises:
        QvlaError: a number is not above zero.
    """

    # Of translations; of rotations and joints; of a gripper, in its own units.
    tolerance_mm: float | None = None
    tolerance_deg: float | None = None
    tolerance_gripper: float | None = None
    # Names of the action's numbers, separated by commas; what one is in millimetres or degrees.
    action_names: str | None = None
    unit_mm: float | None = None
    unit_deg: float | None = None

    def __post_init__(self) -> None:
        numbers = {
            "--tolerance-mm": self.tolerance_mm,
            "--tolerance-deg": self.tolerance_deg,
            "--tolerance-gripper": self.tolerance_gripper,
            "--unit-mm": self.unit_mm,
            "--unit-deg": self.unit_deg,
        }
        for option, value in numbers.items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise QvlaError(f"{option} must be a number above 0, got {value:g}")

    @property
    def labels(self) -> "ActionLabels":
        """Return what the user says of the action."""
        from qvla_export.shared.action_space import ActionLabels

        names = tuple(name.strip() for name in (self.action_names or "").split(",") if name.strip())
        options = ["--action-names"] * bool(names)
        options += ["--unit-mm"] * (self.unit_mm is not None)
        options += ["--unit-deg"] * (self.unit_deg is not None)
        return ActionLabels(", ".join(options), names, self.unit_mm, self.unit_deg)

    def of(self, group: "Group") -> float | None:
        """Return what is allowed in a group; None where nothing is said."""
        amounts: dict[Group, float | None] = {
            "translation": self.tolerance_mm,
            "rotation": self.tolerance_deg,
            "joints": self.tolerance_deg,
            "gripper": self.tolerance_gripper,
        }
        return amounts.get(group)


# The default bounds, and what checkpoint and recording say of the action.
USUAL_TOLERANCE = Tolerance()
