"""The noun `FieldNames`: what clients call a policy's cameras, and pieces of state and action."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jetson.errors import RefusedSetting
from jetson.serving.camera_sides import side_of
from qvla_export.shared.policy_interface import MOST_SIZE

# What protocols put before a name; the server takes it off before it looks at names.
_PREFIXES = ("observation/", "images/", "video.", "state.", "action.")
# Of a policy's actions whole, to clients of GR00T's.
WHOLE_ACTION = "actions"
# What every client may call the primary camera.
PRIMARY_ROLES = ("full_image", "image")


@dataclass(frozen=True)
class FieldNames:
    """Names beside the policy's own that clients may use; the same for every protocol.

    Raises:
        RefusedSetting: a name is there twice.
    """

    # (the policy's camera, the client's field); a camera may have several.
    camera_aliases: tuple[tuple[str, str], ...] = ()
    # Fields that make up the state, concatenated in this order; empty: the field "state".
    state_fields: tuple[str, ...] = ()
    # (name, how many of an action's numbers), in this order; empty: whole. GR00T's clients alone
    # are told actions by name.
    action_fields: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        actions = Counter(name for name, _ in self.action_fields)
        if twice := sorted(name for name, count in actions.items() if count > 1):
            raise RefusedSetting(f"--action-fields names {twice} more than once")
        aliases = Counter(field for _, field in self.camera_aliases)
        names = aliases + Counter(self.state_fields)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise RefusedSetting(
                f"--camera-alias and --state-fields name {twice} more than once; a client's field "
                "is one camera's, or one piece of the state"
            )

    @classmethod
    def parse(
        cls,
        aliases: Sequence[str] | None,
        state_fields: str | None,
        action_fields: str | None = None,
    ) -> "FieldNames":
        """Read `CAMERA=FIELD` texts, `NAME,NAME` and `NAME=SIZE,NAME=SIZE`; prefixes are taken off.

        Args:
            aliases: what clients call cameras.
            state_fields: what they call the pieces of the state.
            action_fields: what they call the pieces of an action, and how long each is.

        Raises:
            RefusedSetting: a text is not of that form, or a name is there twice.
        """
        pairs = []
        for text in aliases or ():
            camera, equals, field = (part.strip() for part in text.partition("="))
            if not (camera and equals and _bare(field)):
                raise RefusedSetting(
                    f"--camera-alias is CAMERA=FIELD, such as full_image=cam_high, got {text!r}"
                )
            pairs.append((camera, _bare(field)))
        fields = [_bare(name.strip()) for name in (state_fields or "").split(",")]
        if state_fields is not None and not all(fields):
            raise RefusedSetting(
                "--state-fields is names separated by commas, such as "
                f"joint_position,gripper_position, got {state_fields!r}"
            )
        return cls(tuple(pairs), tuple(filter(None, fields)), _sized(action_fields))

    def of_policy(self, cameras: Sequence[str], state_dim: int, action_dim: int) -> "FieldNames":
        """Return the names with `full_image` and `image` read as the primary camera.

        Raises:
            RefusedSetting: a camera is not the policy's, a field is the name of another camera or
                of the other side, there are state fields and the policy takes no state, or action
                fields are not as many numbers as an action has.
        """
        aliases = tuple((_camera(name, cameras), field) for name, field in self.camera_aliases)
        for camera, field in aliases:
            sides = {side_of(camera), side_of(field)} - {None}
            if (field in cameras and field != camera) or len(sides) > 1:
                raise RefusedSetting(
                    f"--camera-alias {camera}={field}: {field!r} says that it is another camera "
                    f"than {camera!r}; the policy's are {list(cameras)}. Rename the client's field"
                )
        if self.state_fields and not state_dim:
            raise RefusedSetting(
                f"--state-fields {','.join(self.state_fields)}: this policy takes no state; leave "
                "the option out"
            )
        sizes = [size for _, size in self.action_fields]
        if sizes and sum(sizes) != action_dim:
            raise RefusedSetting(
                f"--action-fields are {sum(sizes)} numbers in all, an action of this policy has "
                f"{action_dim}; say how many each name has"
            )
        return FieldNames(aliases, self.state_fields, self.action_fields)

    def pieces(self, actions: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
        """Return actions [..., dim] by name: whole, or in the pieces that clients know."""
        if not self.action_fields:
            return {WHOLE_ACTION: actions}
        ends = np.cumsum([size for _, size in self.action_fields])
        parts = np.split(actions, ends[:-1], axis=-1)
        names = (name for name, _ in self.action_fields)
        return {name: np.ascontiguousarray(part) for name, part in zip(names, parts, strict=True)}

    def aliases_of(self, camera: str) -> tuple[str, ...]:
        """Return what clients may call a camera beside its own name."""
        return tuple(field for name, field in self.camera_aliases if name == camera)


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _sized(text: str | None) -> tuple[tuple[str, int], ...]:
    pieces = []
    for piece in (text or "").split(",") if text is not None else ():
        name, equals, size = (part.strip() for part in piece.partition("="))
        if not (_bare(name) and equals and size.isdecimal() and 0 < int(size[:9]) <= MOST_SIZE):
            raise RefusedSetting(
                "--action-fields is NAME=SIZE separated by commas, such as "
                f"single_arm=5,gripper=1, got {text!r:.200}"
            )
        pieces.append((_bare(name), int(size)))
    return tuple(pieces)


def _camera(name: str, cameras: Sequence[str]) -> str:
    if name in cameras:
        return name
    if name in PRIMARY_ROLES:
        return cameras[0]
    raise RefusedSetting(
        f"--camera-alias: the policy has no camera {name!r}; its cameras are {list(cameras)}"
    )
