"""Which column of a data set a policy's camera probably is: by its name alone, never by order."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# Words that say nothing of a camera's place.
_EMPTY = {"", "cam", "camera", "image", "images", "img", "observation", "rgb", "color", "view"}
# Words that name one place.
_PLACES = (
    {"wrist", "hand", "gripper", "handeye"},
    {
        *("agentview", "base", "exterior", "external", "front", "full", "head", "high", "main"),
        *("overhead", "primary", "scene", "static", "third", "top"),
    },
)
_SIDES = {"left", "right"}


@dataclass(frozen=True)
class Proposal:
    """A column for each camera that a policy needs, none of them twice."""

    # Camera -> column; None where names do not say which.
    columns: Mapping[str, str | None]
    # Columns that no camera has been given.
    unused: tuple[str, ...]


def propose_columns(needed: Sequence[str], present: Mapping[str, str]) -> Proposal:
    """Propose the columns of a data set for a policy's cameras.

    A camera of the same name keeps its column. Another gets the unused one whose name is more
    like its own than any other's, if it in turn is more like that column's than any other camera
    without one; or the last one that is left. A left camera never gets a right one's.

    Args:
        needed: the policy's cameras.
        present: the data set's: name -> column.
    """
    columns: dict[str, str | None] = {name: present.get(name) for name in needed}
    free = [column for name, column in present.items() if name not in needed]
    while pair := _best_pair([n for n in needed if columns[n] is None], free):
        columns[pair[0]] = pair[1]
        free.remove(pair[1])
    missing = [name for name in needed if columns[name] is None]
    if len(missing) == len(free) == 1 and not _contradict(missing[0], free[0]):
        columns[missing[0]] = free.pop()
    return Proposal(columns, tuple(free))


def _best_pair(names: Sequence[str], columns: Sequence[str]) -> tuple[str, str] | None:
    """Return a name and a column that are likest to each other and to nothing else as much."""
    likeness = {(n, c): _likeness(n, c) for n in names for c in columns}
    for (name, column), value in sorted(likeness.items(), key=lambda item: -item[1]):
        others = [likeness[n, c] for n, c in likeness if (n == name) != (c == column)]
        if value > max(others, default=0):
            return name, column
    return None


def _likeness(name: str, column: str) -> int:
    if _contradict(name, column):
        return -1
    first, second = _words(name), _words(column)
    # Words of one place count once, however many there are.
    places = sum(bool(first & place and second & place) for place in _PLACES)
    return len((first & second) - set().union(*_PLACES)) + places


def _contradict(name: str, column: str) -> bool:
    first, second = _words(name) & _SIDES, _words(column) & _SIDES
    return bool(first and second) and first != second


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z]+", name.lower())) - _EMPTY
