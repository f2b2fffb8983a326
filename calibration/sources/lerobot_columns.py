"""Which columns of a LeRobotDataset are cameras, state, action and instruction."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from calibration.sources.lerobot_writer import ACTION_KEY, STATE_KEY
from qvla_export.shared.errors import QvlaError

# What others call the state and the action: openpi's LIBERO and DROID conversions.
_STATES = (
    "state",
    "observation/state",
    "observation.state.joint_position,observation.state.gripper_position",
    "joint_position,gripper_position",
)
_ACTIONS = ("actions",)
_VISUAL = ("image", "video")
_CHANNELS = 3
_REMEDY = (
    "name the columns: --camera NAME=COLUMN for each camera of the policy, --state-column COLUMN "
    "('' for a policy without a state; several, separated by commas, are put one after another), "
    "--action-column COLUMN, --instruction-column COLUMN"
)


@dataclass(frozen=True)
class KeyMap:
    """Where a dataset keeps what we need; the defaults are LeRobot's usual names.

    Where a usual name is missing, those of openpi's conversions are looked for.
    """

    # Camera name -> column.  Empty: every image column, named by the last part of its key.
    images: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    # One column or several separated by commas; None for a dataset without proprioception.
    state: str | None = STATE_KEY
    # None for a dataset without actions, which calibration does not need.
    action: str | None = ACTION_KEY
    # A column of texts; None for the task that `task_index` names.
    instruction: str | None = None
    # What to do in every frame, in words, whatever the recording says.
    one_instruction: str | None = None


def resolve_columns(keys: KeyMap, features: Mapping[str, Any]) -> KeyMap:
    """Return the columns that a dataset has for what is asked for.

    Raises:
        QvlaError: a column is missing, of another kind, or of two cameras at once.
    """
    kinds = {key: _kind(feature) for key, feature in features.items()}
    state = _usual(keys.state, STATE_KEY, _STATES, features)
    action = _usual(keys.action, ACTION_KEY, _ACTIONS, features)
    if action == ACTION_KEY and action not in features:
        action = None
    images = dict(keys.images) or _all_cameras(kinds)
    needed = [*images.values(), *split_columns(action), *split_columns(state)]
    needed += [keys.instruction] if keys.instruction else []
    missing = [key for key in needed if key not in features]
    if missing or not images:
        raise QvlaError(
            f"the dataset has no {', '.join(missing) or 'images'}; its keys are "
            f"{', '.join(features)}; {_REMEDY}"
        )
    _require_pictures(images, features)
    return KeyMap(MappingProxyType(images), state, action, keys.instruction, keys.one_instruction)


def split_columns(text: str | None) -> tuple[str, ...]:
    """Return the columns that a text names, separated by commas."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())


def number_names(features: Mapping[str, Any], columns: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the numbers in columns of vectors, as `names` of their features says.

    LeRobot writes a list, or a table of lists such as {"motors": [...]}. Empty where names are
    missing, not told apart, or only number themselves (action_0, action_1).
    """
    names = [name for column in columns for name in _names(features[column])]
    stems = {re.sub(r"[\W_]*\d+$", "", name) for name in names}
    numbered = len(names) > 1 and len(stems) == 1 and not _says_what(stems.pop())
    return () if numbered or len(set(names)) < len(names) else tuple(names)


def _names(feature: Any) -> list[str]:
    value = feature.get("names") if isinstance(feature, dict) else None
    if isinstance(value, dict):
        lists = list(value.values())
        value = [name for part in lists if isinstance(part, list) for name in part]
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return []
    return value


def _says_what(stem: str) -> bool:
    return stem not in ("", "action", "actions", "dim", "dimension", "motor", "value", "a")


def is_video(feature: Any) -> bool:
    """Return whether a feature's pictures are in video files."""
    return _kind(feature) == "video"


def is_whole(feature: Any) -> bool:
    """Return whether a feature is of whole numbers."""
    return _kind(feature).startswith(("int", "uint"))


def picture_size(feature: Any) -> tuple[int, int, int] | None:
    """Return height, width and 3 as a feature's shape states them; None where it does not."""
    shape = feature.get("shape") if isinstance(feature, dict) else None
    if not isinstance(shape, list | tuple) or len(shape) != 3:
        return None
    # Either order is written; pictures of 3 pixels are not.
    sides = shape[1:] if shape[0] == _CHANNELS else shape[:2]
    whole = all(isinstance(side, int) and not isinstance(side, bool) for side in sides)
    return (*sides, _CHANNELS) if whole else None


def _is_depth(feature: Mapping[str, Any]) -> bool:
    # `video_info` is what v2 wrote.
    notes = [note for key in ("info", "video_info") if isinstance(note := feature.get(key), dict)]
    keys = ("is_depth_map", "video.is_depth_map")
    return any(note.get(key) is True for note in notes for key in keys)


def _usual(
    name: str | None, usual: str, others: tuple[str, ...], features: Mapping[str, Any]
) -> str | None:
    """Return another known name where the usual one is asked for and is not there."""
    if name != usual or usual in features:
        return name
    return next((o for o in others if all(c in features for c in split_columns(o))), name)


def _kind(feature: Any) -> str:
    kind = feature.get("dtype") if isinstance(feature, dict) else None
    return kind if isinstance(kind, str) else "of no dtype"


def _all_cameras(kinds: Mapping[str, str]) -> dict[str, str]:
    columns = [key for key, kind in kinds.items() if kind in _VISUAL]
    names = [re.split(r"[./]", key)[-1] for key in columns]
    if shared := [name for name, count in Counter(names).items() if count > 1]:
        same = [c for n, c in zip(names, columns, strict=True) if n in shared]
        raise QvlaError(
            f"{', '.join(same)} would all be camera {', '.join(shared)}; "
            "name them with --camera NAME=COLUMN"
        )
    return dict(zip(names, columns, strict=True))


def _require_pictures(images: Mapping[str, str], features: Mapping[str, Any]) -> None:
    kinds = {key: _kind(feature) for key, feature in features.items()}
    for column, count in Counter(images.values()).items():
        if count > 1:
            names = [name for name, key in images.items() if key == column]
            raise QvlaError(
                f"cameras {', '.join(names)} would all show column {column}; "
                "give each camera a column of its own with --camera NAME=COLUMN"
            )
    if others := [key for key in images.values() if kinds[key] not in _VISUAL]:
        raise QvlaError(f"{', '.join(others)}: not an image but {kinds[others[0]]}")
    if depths := [key for key in images.values() if _is_depth(features[key])]:
        raise QvlaError(
            f"{', '.join(depths)}: depth, as info.json says, and no RGB picture; name only colour "
            "cameras with --camera NAME=COLUMN"
        )
