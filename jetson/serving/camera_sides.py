"""Left and right among wrist cameras: where a name says which, names decide, never the order."""

import re
from collections.abc import Sequence
from typing import Literal

from qvla_export.shared.errors import InvalidObservation

Side = Literal["left", "right"]

_WORDS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_SIDES: dict[str, Side] = {"left": "left", "l": "left", "right": "right", "r": "right"}


def side_of(name: str) -> Side | None:
    """Return the side that a camera's name says: "cam_left_wrist", "wristRight", "wrist_l"."""
    sides = {_SIDES[word] for word in map(str.lower, _WORDS.findall(name)) if word in _SIDES}
    return sides.pop() if len(sides) == 1 else None


def match_wrists(cameras: Sequence[str], fields: Sequence[str]) -> dict[str, str]:
    """Return camera -> wrist field; a camera that no field is for is left out.

    Sides are matched first. What is left over is matched in order, as openvla-oft does with all
    of them, unless the order would decide between left and right.

    Raises:
        InvalidObservation: names do not say which field is which camera's.
    """
    matches: dict[str, str] = {}
    for side in ("left", "right"):
        sided = [camera for camera in cameras if side_of(camera) == side]
        sources = [field for field in fields if side_of(field) == side]
        if len(sided) == len(sources) == 1:
            matches[sided[0]] = sources[0]
    left_over = [camera for camera in cameras if camera not in matches]
    rest = [field for field in fields if field not in matches.values()]
    if left_over and rest and not _order_is_safe(left_over, rest):
        raise InvalidObservation(
            f"wrist images {[name[:80] for name in rest[:16]]} do not say which is which of the "
            f"policy's cameras {left_over}; send them by these names"
        )
    return matches | dict(zip(left_over, rest, strict=False))


def _order_is_safe(cameras: Sequence[str], fields: Sequence[str]) -> bool:
    """Whether nothing is left or right, or only one camera and one field are, without a clash."""
    sides = {side for name in (*cameras, *fields) if (side := side_of(name))}
    return not sides or (len(cameras) == len(fields) == 1 and len(sides) == 1)
