"""What a policy sees and returns, where its checkpoint does not say so: `qvla_policy.json`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qvla_export.shared.artifacts import read_json
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.normalization import Normalization

CONFIG_NAME = "qvla_policy.json"


@dataclass(frozen=True)
class PolicyInterface:
    """Cameras, chunk, dimensions and normalization of a policy; families add what else they need.

    Raises:
        CheckpointError: no camera, a dimension out of range, an unknown normalization.
    """

    # Image names in training order, primary camera first.
    cameras: tuple[str, ...]
    # Actions in a chunk, dimensions of an action, length of the state (0: none).
    horizon: int
    action_dim: int
    state_dim: int
    normalization: Normalization

    def __post_init__(self) -> None:
        if not self.cameras or min(self.horizon, self.action_dim) < 1 or self.state_dim < 0:
            raise CheckpointError(
                "a policy needs at least one camera, horizon and action_dim >= 1 and "
                f"state_dim >= 0, got {self}"
            )
        self._require_choice("normalization", ("q99", "bounds"))

    def _require_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise CheckpointError(f"{name} must be one of {allowed}, got {self!r}")


# Published robots by name, as openvla-oft's `prismatic/vla/constants.py` has them.
INTERFACES: Mapping[str, PolicyInterface] = {
    "libero": PolicyInterface(("full_image", "wrist_image"), 8, 7, 8, "q99"),
    "aloha": PolicyInterface(
        ("full_image", "left_wrist_image", "right_wrist_image"), 25, 14, 14, "bounds"
    ),
    "bridge": PolicyInterface(("full_image",), 5, 7, 7, "q99"),
}


def read_policy_config(checkpoint: Path) -> dict[str, Any]:
    """Read the fields of `qvla_policy.json` beside a checkpoint's weights; lists become tuples.

    Raises:
        CheckpointError: the file is absent; the message names the presets.
        ArtifactError: it is not JSON.
    """
    path = checkpoint / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {CONFIG_NAME}, and an OFT checkpoint does not say its chunk, "
            f"dimensions or cameras. Write the file or choose a preset of {sorted(INTERFACES)}."
        )
    raw = read_json(path, "policy configuration")
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} is not a policy configuration: it is no JSON object")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}


def load_interface(checkpoint: Path, preset: str | None = None) -> PolicyInterface:
    """Return what a checkpoint's policy sees and returns, whatever its family.

    Args:
        checkpoint: its folder.
        preset: a name in `INTERFACES`, instead of the file beside the weights.

    Raises:
        CheckpointError: the preset is unknown, or the file is absent or malformed.
    """
    if preset is not None:
        return INTERFACES[require_preset(preset)]
    raw = read_policy_config(checkpoint)
    known = {field.name: raw[field.name] for field in fields(PolicyInterface) if field.name in raw}
    try:
        return PolicyInterface(**known)
    except TypeError as error:
        path = checkpoint / CONFIG_NAME
        raise CheckpointError(f"{path} is not a policy configuration: {error}") from error


def fitting_presets(action_dim: int, state_dim: int | None) -> str:
    """Say which presets have these dimensions, as the end of an error; empty if none has.

    Args:
        action_dim: dimensions of an action.
        state_dim: length of the state; None where it is not known.
    """
    names = [
        name
        for name, interface in INTERFACES.items()
        if interface.action_dim == action_dim and state_dim in (None, interface.state_dim)
    ]
    return f"; --preset {' or '.join(names)} has these" if names else ""


def require_preset(preset: str) -> str:
    """Return a preset's name.

    Raises:
        CheckpointError: it is unknown.
    """
    if preset not in INTERFACES:
        raise CheckpointError(f"preset must be one of {sorted(INTERFACES)}, got {preset!r}")
    return preset
