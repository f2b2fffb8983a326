"""What an OpenVLA-OFT checkpoint does not say about itself, stated by the user, never guessed."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from qvla_export.policies.prismatic.config import PrismaticConfig
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

    head: Literal["l1", "tokens", "diffusion"] = "l1"
    # Llama-2's end; other vocabularies have another.
    stop_token_id: int = 2
    # Of a diffusion head: steps of the noise in training, steps that are taken, and the seed of the
    # noise that they begin at.
    diffusion_train_steps: int = 50
    diffusion_steps: int = 50
    noise_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("head", ("l1", "tokens", "diffusion"))
        train, steps = self.diffusion_train_steps, self.diffusion_steps
        if type(train) is not int or type(steps) is not int or not 1 <= steps <= train <= 1000:
            raise CheckpointError(
                "diffusion_steps must be a whole number from 1 to diffusion_train_steps, which is "
                f"at most 1000, got {steps!r} and {train!r}"
            )
        if type(self.noise_seed) is not int or self.noise_seed < 0:
            raise CheckpointError(f"noise_seed must be a number from 0 on, got {self.noise_seed!r}")
        self._require_whole("stop_token_id", 0, (1 << 31) - 1)


PRESETS: dict[str, OftConfig] = {
    name: OftConfig(**vars(interface), training_image_size=224, center_crop=True)
    for name, interface in INTERFACES.items()
}


def load_config(checkpoint: Path, preset: str | None = None) -> OftConfig:
    """Read `qvla_policy.json` beside a checkpoint's weights, or take a preset instead.

    Where it does not say the head, a projector of noisy actions among the files tells the diffusion
    head from the L1 head.

    Raises:
        CheckpointError: the preset is unknown, or the file is absent (the message names the
            presets) or malformed.
    """
    if preset is not None:
        return replace(PRESETS[require_preset(preset)], head=_stored_head(checkpoint))
    try:
        return OftConfig(**{"head": _stored_head(checkpoint), **read_policy_config(checkpoint)})
    except TypeError as error:
        path = checkpoint / CONFIG_NAME
        raise CheckpointError(f"{path} is not a policy configuration: {error}") from error


def _stored_head(checkpoint: Path) -> Literal["l1", "diffusion"]:
    """Say which head a folder's files are of, where nothing else says it."""
    return "diffusion" if any(checkpoint.glob("*noisy_action_projector*checkpoint*")) else "l1"
