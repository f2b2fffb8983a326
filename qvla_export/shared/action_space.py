"""The noun `ActionSpace`: what an action's numbers are called, what they move, in which units."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import QvlaError

Group = Literal["translation", "rotation", "joints", "gripper", "other"]
GROUPS: tuple[Group, ...] = ("translation", "rotation", "joints", "gripper", "other")
DEGREES = 180 / np.pi
# What OpenVLA's policies return on every robot with one arm and one gripper (openvla
# `prismatic/vla/datasets/rlds/oxe`: position, orientation, gripper; the gripper is not normalized).
END_EFFECTOR = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")

# The first that is found decides: a wrist's roll is a joint's, a gripper's position no translation.
_WORDS: tuple[tuple[Group, re.Pattern[str]], ...] = (
    ("gripper", re.compile(r"gripper|finger|grasp|claw|jaw")),
    ("joints", re.compile(r"joint|waist|shoulder|elbow|wrist|forearm|upperarm|\bj\d+\b|hip|knee")),
    ("rotation", re.compile(r"\bd?(roll|pitch|yaw)\b|\bd?r[xyz]\b|\brot [xyz]\b|axis ?angle")),
    ("translation", re.compile(r"\bd?[xyz]\b|\bpos [xyz]\b")),
)
_SEVERAL = 3  # numbers of one position, or of one orientation


@dataclass(frozen=True)
class ActionLabels:
    """What one source says of an action's numbers."""

    # In words: "the data set", "preset libero".
    source: str
    # Empty where it does not say.
    names: tuple[str, ...] = ()
    # Millimetres of one unit of a translation, degrees of one of a rotation; None where unknown.
    unit_mm: float | None = None
    unit_deg: float | None = None


@dataclass(frozen=True)
class ActionSpace:
    """Names, groups and units of an action's numbers, and where each is known from."""

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    unit_mm: float | None
    unit_deg: float | None
    # In words.
    names_source: str
    units_source: str

    def present(self) -> tuple[Group, ...]:
        """Return the groups that the action has, in their order."""
        return tuple(group for group in GROUPS if group in self.groups)

    def members(self, group: Group) -> list[int]:
        """Return the places of a group's numbers."""
        return [i for i, found in enumerate(self.groups) if found == group]

    def unit(self, group: Group) -> tuple[str, float]:
        """Return the unit that a group's differences are stated in, and what one number is in it.

        Where nothing says what a number is, it is stated as it is, in "units".
        """
        if group == "translation" and self.unit_mm is not None:
            return "mm", self.unit_mm
        if group in ("rotation", "joints") and self.unit_deg is not None:
            return "deg", self.unit_deg
        return "units", 1.0

    def differences(
        self, group: Group, a: NDArray[np.floating], b: NDArray[np.floating]
    ) -> NDArray[np.float64]:
        """Return how far actions are apart in one group, in its unit.

        Positions and orientations: the Euclidean distance, of two arms the larger. Joints,
        grippers and what has no name: the largest difference. Angles in known units are compared
        around the circle.

        Args:
            group: one that is present.
            a, b: float [..., dim], in the action's own units.

        Returns:
            float64 [...]
        """
        unit, scale = self.unit(group)
        places = self.members(group)
        apart = scale * (a[..., places].astype(np.float64) - b[..., places])
        if group == "rotation" and unit == "deg":
            apart = (apart + 180.0) % 360.0 - 180.0
        if group in ("translation", "rotation") and len(places) % _SEVERAL == 0:
            arms = apart.reshape(*apart.shape[:-1], -1, _SEVERAL)
            apart = np.sqrt(np.square(arms).sum(axis=-1))
        largest: NDArray[np.float64] = np.abs(apart).max(axis=-1)
        return largest


def group_of(name: str) -> Group:
    """Return what a number moves, as its name says: "left_shoulder" is a joint, "dx" no joint."""
    text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.sub(r"[\W_]+", " ", re.sub(r"(delta|ee|eef|tcp|pos|vel)(?=[\W_])", " ", text))
    return next((g for g, pattern in _WORDS if pattern.search(words.lower().strip())), "other")


def action_space(dim: int, mask: NDArray[np.bool_], labels: Sequence[ActionLabels]) -> ActionSpace:
    """Return the names and units of an action of `dim` numbers, each from the first who says it.

    Where nobody names them, seven numbers of which the last alone is not normalized are taken for
    OpenVLA's usual seven, and said to be; others stay without names.

    Args:
        dim: numbers of an action.
        mask: which of them are normalized, `Bounds.mask`.  bool [dim]
        labels: what is said of them, the most trusted first.

    Raises:
        QvlaError: who names them names more or fewer.
    """
    for label in labels:
        if label.names and len(label.names) != dim:
            raise QvlaError(
                f"the policy's actions have {dim} numbers, {label.source} names "
                f"{len(label.names)}: {', '.join(label.names)}; name each once, in their order"
            )
    named = next((label for label in labels if label.names), None)
    names = () if named is None else named.names
    source = "" if named is None else named.source
    if not names and dim == len(END_EFFECTOR) and mask.tolist() == [True] * 6 + [False]:
        names = END_EFFECTOR
        source = "assumed: seven numbers, the last not normalized, as OpenVLA's"
    mm = next((label for label in labels if label.unit_mm is not None), None)
    deg = next((label for label in labels if label.unit_deg is not None), None)
    sources = dict.fromkeys(label.source for label in (mm, deg) if label is not None)
    groups: list[Group] = [group_of(name) for name in names] or ["other"] * dim
    return ActionSpace(
        names or tuple(f"dimension {i}" for i in range(dim)),
        tuple(groups),
        None if mm is None else mm.unit_mm,
        None if deg is None else deg.unit_deg,
        source or "nothing names them",
        ", ".join(sources) or "nothing says",
    )
