"""What an OpenVLA-OFT checkpoint does not say about itself, stated by the user, never guessed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from qvla_export.policies.prismatic.config import PrismaticConfig
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.policy_interface import (
    CONFIG_NAME,
    INTERFACES,
    read_policy_config,
    require_preset,
)


@dataclass(frozen=True)
class OftConfig(PrismaticConfig):
    """Inputs, outputs and vocabulary of one OpenVLA-OFT checkpoint.

    Upstream chooses these by looking for "libero", "aloha" or "bridge" in the command line
    (`prismatic/vla/constants.py`); here they are a file, or one of `PRESETS` by name.
    """

    head: Literal["l1", "tokens"] = "l1"
    # Llama-2's end; other vocabularies have another.
    stop_token_id: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("head", ("l1", "tokens"))
        self._require_whole("stop_token_id", 0, (1 << 31) - 1)


PRESETS: dict[str, OftConfig] = {
    name: OftConfig(**vars(interface), training_image_size=224, center_crop=True)
    for name, interface in INTERFACES.items()
}


def load_config(checkpoint: Path, preset: str | None = None) -> OftConfig:
    """Read `qvla_policy.json` beside a checkpoint's weights, or take a preset instead.

    Raises:
        CheckpointError: the preset is unknown, or the file is absent (the message names the
            presets) or malformed.
    """
    if preset is not None:
        return PRESETS[require_preset(preset)]
    try:
        return OftConfig(**read_policy_config(checkpoint))
    except TypeError as error:
        path = checkpoint / CONFIG_NAME
        raise CheckpointError(f"{path} is not a policy configuration: {error}") from error


def save_config(config: OftConfig, checkpoint: Path) -> None:
    """Write `qvla_policy.json` into a checkpoint folder."""
    value: dict[str, Any] = asdict(config)
    write_json(checkpoint / CONFIG_NAME, value)
