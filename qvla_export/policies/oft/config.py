"""What an OpenVLA-OFT checkpoint does not say about itself, stated by the user, never guessed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.normalization import Normalization

CONFIG_NAME = "qvla_policy.json"


@dataclass(frozen=True)
class OftConfig:
    """Inputs, outputs and vocabulary of one OpenVLA-OFT checkpoint.

    Upstream chooses these by looking for "libero", "aloha" or "bridge" in the command line
    (`prismatic/vla/constants.py`); here they are a file, or one of `PRESETS` by name.
    """

    # Image names in training order, primary camera first.
    cameras: tuple[str, ...]
    # Actions in a chunk, dimensions of an action, length of the state (0: none).
    horizon: int
    action_dim: int
    state_dim: int
    normalization: Normalization
    head: Literal["l1", "tokens"] = "l1"
    # Attention heads of the DINOv2 and SigLIP towers: the one shape weights do not show.
    vision_heads: tuple[int, int] = (16, 16)
    # Llama-2's beginning, end and empty piece; other vocabularies have others.
    bos_token_id: int = 1
    stop_token_id: int = 2
    suffix_token_id: int = 29871
    # Side of the frames after the JPEG + lanczos step of the training data; 0: no such step.
    training_image_size: int = 0
    center_crop: bool = False

    def __post_init__(self) -> None:
        if not self.cameras or min(self.horizon, self.action_dim) < 1 or self.state_dim < 0:
            raise CheckpointError(
                "a policy needs at least one camera, horizon and action_dim >= 1 and "
                f"state_dim >= 0, got {self}"
            )
        choices = (("head", ("l1", "tokens")), ("normalization", ("q99", "bounds")))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise CheckpointError(f"{name} must be one of {allowed}, got {self!r}")


PRESETS: dict[str, OftConfig] = {
    "libero": OftConfig(
        ("full_image", "wrist_image"), 8, 7, 8, "q99", training_image_size=224, center_crop=True
    ),
    "aloha": OftConfig(
        ("full_image", "left_wrist_image", "right_wrist_image"),
        25,
        14,
        14,
        "bounds",
        training_image_size=224,
        center_crop=True,
    ),
    "bridge": OftConfig(("full_image",), 5, 7, 7, "q99", training_image_size=224, center_crop=True),
}


def load_config(checkpoint: Path) -> OftConfig:
    """Read `qvla_policy.json` beside a checkpoint's weights.

    Raises:
        CheckpointError: the file is absent (the message names the presets) or malformed.
    """
    path = checkpoint / CONFIG_NAME
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} has no {CONFIG_NAME}, and an OFT checkpoint does not say its chunk, "
            f"dimensions or cameras. Write the file or choose a preset of {sorted(PRESETS)}."
        )
    raw = read_json(path, "policy configuration")
    try:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
        return OftConfig(**fields)
    except TypeError as error:
        raise CheckpointError(f"{path} is not a policy configuration: {error}") from error


def save_config(config: OftConfig, checkpoint: Path) -> None:
    """Write `qvla_policy.json` into a checkpoint folder."""
    value: dict[str, Any] = asdict(config)
    write_json(checkpoint / CONFIG_NAME, value)
