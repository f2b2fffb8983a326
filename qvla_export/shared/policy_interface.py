"""What a policy sees and returns, where its checkpoint does not say so: `qvla_policy.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

from qvla_export.shared.action_space import DEGREES, END_EFFECTOR
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.lerobot.lerobot_config import LeRobotConfig, is_lerobot, read_lerobot_config
from qvla_export.shared.normalization import Normalization, read_statistics
from qvla_export.shared.openpi.openpi_files import (
    SLOTS,
    is_openpi,
    openpi_sizes,
    read_openpi_config,
)

CONFIG_NAME = "qvla_policy.json"
# Of a horizon, an action or a state.
MOST_SIZE = 4096
# No unit of a robot's action is larger, in millimetres or degrees.
_MOST_UNIT = 1e9
# Values of `head`: a policy whose tokens come one after the other, each given those before, stand
# for its action, or are latent and decoded to a chunk.
AUTOREGRESSIVE: Final = "autoregressive"
LATENT: Final = "latent"
# Actions of a chunk of a published policy with latent tokens (LIBERO's and CALVIN's).
LATENT_HORIZON = 12
# Holds what decodes latent tokens to a chunk; no other policy has one.
LATENT_DECODER = "action_decoder*.pt"


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
    # Names of an action's numbers ("x", "left_waist"); empty where nobody says.
    action_names: tuple[str, ...] = ()
    # Millimetres of one unit of a translation, degrees of one of a rotation or joint.
    action_unit_mm: float | None = None
    action_unit_deg: float | None = None

    def __post_init__(self) -> None:
        self._require_names("cameras", 1)
        self._require_names("action_names", 0)
        self._require_whole("horizon", 1, MOST_SIZE)
        self._require_whole("action_dim", 1, MOST_SIZE)
        self._require_whole("state_dim", 0, MOST_SIZE)
        self._require_choice("normalization", ("q99", "bounds", "files"))
        if len(self.action_names) not in (0, self.action_dim):
            raise CheckpointError(
                f"action_names must name each of {self.action_dim} numbers of an action, "
                f"got {len(self.action_names)}: {', '.join(map(str, self.action_names))}"
            )
        for name in ("action_unit_mm", "action_unit_deg"):
            value = getattr(self, name)
            if value is not None and not (type(value) in (int, float) and 0 < value <= _MOST_UNIT):
                raise CheckpointError(f"{name} must be a number above 0, got {value!r}")

    def _require_names(self, name: str, least: int) -> None:
        value = getattr(self, name)
        texts = isinstance(value, tuple) and all(isinstance(v, str) and v for v in value)
        if not texts or len(value) < least or len(set(value)) != len(value):
            raise CheckpointError(
                f"{name} must be a list of at least {least} different names, got {value!r:.200}"
            )

    def _require_whole(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if type(value) is not int or not low <= value <= high:
            raise CheckpointError(
                f"{name} must be a whole number from {low} to {high:,}, got {value!r:.80}"
            )

    def _require_choice(self, name: str, allowed: tuple[str, ...]) -> None:
        if getattr(self, name) not in allowed:
            raise CheckpointError(f"{name} must be one of {allowed}, got {self!r}")


# Published robots by name, as openvla-oft's `prismatic/vla/constants.py` has them.
# Units: LIBERO's controller moves 50 mm or 0.5 rad at an action of 1 (robosuite 1.4 OSC_POSE,
# `output_max`), BridgeData's actions are metres and radians, ALOHA's joints radians.
_ALOHA_ARM = (
    "waist",
    "shoulder",
    "elbow",
    "forearm_roll",
    "wrist_angle",
    "wrist_rotate",
    "gripper",
)
INTERFACES: Mapping[str, PolicyInterface] = {
    "libero": PolicyInterface(
        ("full_image", "wrist_image"), 8, 7, 8, "q99", END_EFFECTOR, 50.0, 0.5 * DEGREES
    ),
    "aloha": PolicyInterface(
        ("full_image", "left_wrist_image", "right_wrist_image"),
        25,
        14,
        14,
        "bounds",
        action_names=tuple(f"{side}_{name}" for side in ("left", "right") for name in _ALOHA_ARM),
        action_unit_deg=DEGREES,
    ),
    "bridge": PolicyInterface(("full_image",), 5, 7, 7, "q99", END_EFFECTOR, 1000.0, DEGREES),
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


def save_policy_config(config: PolicyInterface, checkpoint: Path) -> None:
    """Write `qvla_policy.json` into a checkpoint folder."""
    write_json(checkpoint / CONFIG_NAME, asdict(config))


def head_of(checkpoint: Path) -> str:
    """Say what makes the action of a policy of OpenVLA's model type.

    `head` of its `qvla_policy.json` says so. Without one its files do: an `action_decoder*.pt`
    decodes latent tokens; another file of a head or a projector, a chunk or a state are of a head
    that is read all at once ("l1"); with none of them, its tokens are its action.

    Raises:
        ArtifactError, CheckpointError: `qvla_policy.json` is malformed.
    """
    config: dict[str, Any] = {}
    if (checkpoint / CONFIG_NAME).is_file():
        config = read_policy_config(checkpoint)
    if "head" in config:
        return str(config["head"])
    if any(checkpoint.glob(LATENT_DECODER)):
        return LATENT
    parts = any(checkpoint.glob("*--*checkpoint*"))
    alone = not parts and config.get("horizon", 1) == 1 and not config.get("state_dim")
    return AUTOREGRESSIVE if alone else "l1"


def token_interface(checkpoint: Path, horizon: int = 1) -> PolicyInterface:
    """Return what a policy that decodes tokens sees and returns, as such were published.

    One camera, actions of as many dimensions as the statistics have, no state. What
    `qvla_policy.json` says instead goes first.

    Args:
        checkpoint: its folder.
        horizon: actions of a chunk, where nothing says another number.

    Raises:
        CheckpointError: the statistics do not tell the dimensions, or the file is malformed.
    """
    values: dict[str, Any] = {
        "cameras": ("full_image",),
        "horizon": horizon,
        "state_dim": 0,
        "normalization": "q99",
    }
    if (checkpoint / CONFIG_NAME).is_file():
        values |= read_policy_config(checkpoint)
    if "action_dim" not in values:
        values["action_dim"] = _stated_dimensions(checkpoint)
    names = {field.name for field in fields(PolicyInterface)}
    return PolicyInterface(**{name: value for name, value in values.items() if name in names})


def _stated_dimensions(checkpoint: Path) -> int:
    """Dimensions of an action: equal in all data sets of the statistics."""
    path, table = read_statistics(checkpoint / "dataset_statistics.json")
    sizes = set()
    for entry in table.values():
        action = entry.get("action") if isinstance(entry, dict) else None
        limit = action.get("q01") if isinstance(action, dict) else None
        sizes.add(len(limit) if isinstance(limit, list) else 0)
    if len(sizes) != 1 or 0 in sizes:
        raise CheckpointError(
            f"{path} must state actions of one size, got {sorted(sizes)}; write action_dim into "
            f"{checkpoint / CONFIG_NAME}"
        )
    return sizes.pop()


def lerobot_interface(config: LeRobotConfig) -> PolicyInterface:
    """Return what the policy of a LeRobot checkpoint sees and returns, as its config.json says."""
    return PolicyInterface(
        cameras=tuple(config.cameras),
        horizon=config.node.field("chunk_size").whole(1, 4096),
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        normalization="files",
    )


def openpi_interface(
    checkpoint: Path, preset: str | None = None, unnorm_key: str | None = None
) -> PolicyInterface:
    """Return what the policy of an openpi checkpoint sees and returns.

    Args:
        checkpoint: its folder.
        preset: a name in `INTERFACES`, for cameras in openpi's order, dimensions and units.
        unnorm_key: asset whose statistics tell the dimensions; None if there is only one.

    Raises:
        CheckpointError, StatisticsError, ArtifactError: files or preset are none.
    """
    horizon = read_openpi_config(checkpoint).horizon
    if preset is not None:
        interface = INTERFACES[require_preset(preset)]
        return replace(interface, horizon=horizon, normalization="files")
    sizes = openpi_sizes(checkpoint, unnorm_key)
    values: dict[str, Any] = vars(PolicyInterface(SLOTS, horizon, *sizes, "files"))
    if (checkpoint / CONFIG_NAME).is_file():
        names = {field.name for field in fields(PolicyInterface)}
        stated = read_policy_config(checkpoint)
        values |= {name: value for name, value in stated.items() if name in names}
    return PolicyInterface(**values)


def load_interface(
    checkpoint: Path, preset: str | None = None, unnorm_key: str | None = None
) -> PolicyInterface:
    """Return what a checkpoint's policy sees and returns, whatever its family.

    Args:
        checkpoint: its folder.
        preset: a name in `INTERFACES`, instead of the file beside the weights.
        unnorm_key: as `openpi_interface`.

    Raises:
        CheckpointError: the preset is unknown, or the file is absent or malformed.
        StatisticsError, ArtifactError: as `openpi_interface`, of openpi's files.
    """
    if is_lerobot(checkpoint):
        return lerobot_interface(read_lerobot_config(checkpoint, preset))
    if is_openpi(checkpoint):
        return openpi_interface(checkpoint, preset, unnorm_key)
    if preset is not None:
        return INTERFACES[require_preset(preset)]
    head = head_of(checkpoint)
    if head in (AUTOREGRESSIVE, LATENT):
        return token_interface(checkpoint, LATENT_HORIZON if head == LATENT else 1)
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
