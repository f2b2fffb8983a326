"""The noun `FieldNames`: what clients call a policy's cameras and the pieces of its state."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from jetson.errors import RefusedSetting
from jetson.serving.camera_sides import side_of

# What protocols put before a name; the server takes it off before it looks at names.
_PREFIXES = ("observation/", "images/", "video.", "state.")
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

    def __post_init__(self) -> None:
        aliases = Counter(field for _, field in self.camera_aliases)
        names = aliases + Counter(self.state_fields)
        if twice := sorted(name for name, count in names.items() if count > 1):
            raise RefusedSetting(
                f"--camera-alias and --state-fields name {twice} more than once; a client's field "
                "is one camera's, or one piece of the state"
            )

    @classmethod
    def parse(cls, aliases: Sequence[str] | None, state_fields: str | None) -> "FieldNames":
        """Read `CAMERA=FIELD` texts and comma-separated state fields; prefixes are taken off.

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
        return cls(tuple(pairs), tuple(filter(None, fields)))

    def of_policy(self, cameras: Sequence[str], state_dim: int) -> "FieldNames":
        """Return the names with `full_image` and `image` read as the primary camera.

        Raises:
            RefusedSetting: a camera is not the policy's, a field is the name of another camera or
                of the other side, or there are state fields and the policy takes no state.
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
        return FieldNames(aliases, self.state_fields)

    def aliases_of(self, camera: str) -> tuple[str, ...]:
        """Return what clients may call a camera beside its own name."""
        return tuple(field for name, field in self.camera_aliases if name == camera)


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _camera(name: str, cameras: Sequence[str]) -> str:
    if name in cameras:
        return name
    if name in PRIMARY_ROLES:
        return cameras[0]
    raise RefusedSetting(
        f"--camera-alias: the policy has no camera {name!r}; its cameras are {list(cameras)}"
    )
