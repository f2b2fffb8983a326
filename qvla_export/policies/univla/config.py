"""What a UniVLA checkpoint does not say about itself; a file may, or a default does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvla_export.policies.prismatic.config import PrismaticConfig, read_token_config
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.policy_interface import (
    CONFIG_NAME,
    LATENT,
    LATENT_HORIZON,
)

_MOST_TOKENS, _MOST_CODES, _MOST_HEADS = 256, 1 << 16, 1024


@dataclass(frozen=True)
class UniVlaConfig(PrismaticConfig):
    """Inputs and vocabulary of one UniVLA checkpoint: one camera, a chunk, no state."""

    head: Literal["latent"] = "latent"
    # Tokens that are decoded for one chunk, and how many there are to choose from.
    latent_tokens: int = 4
    codebook: int = 32
    # Attention heads of the action decoder; 0 for one every 64 of its width, as published.
    decoder_heads: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("head", (LATENT,))
        if len(self.cameras) != 1 or self.state_dim:
            raise CheckpointError(f"a UniVLA policy sees one camera and takes no state, got {self}")
        self._require_whole("latent_tokens", 1, _MOST_TOKENS)
        self._require_whole("codebook", 2, _MOST_CODES)
        self._require_whole("decoder_heads", 0, _MOST_HEADS)


def load_config(checkpoint: Path, preset: str | None = None) -> UniVlaConfig:
    """Read `qvla_policy.json` beside a checkpoint's weights; where it is absent, take defaults.

    The default is UniVLA as evaluated on LIBERO (`experiments/robot/libero/run_libero_eval.py`):
    see `token_interface`; 12 actions, 224 pixel frames cropped to their centre.

    Raises:
        CheckpointError: a preset is named, or the file is malformed.
    """
    if preset is not None:
        raise CheckpointError(
            f"{checkpoint} decodes latent tokens, so it is a UniVLA checkpoint; preset {preset!r} "
            f"is for OpenVLA-OFT's: leave it out, and write what differs into {CONFIG_NAME}"
        )
    usual = {"training_image_size": 224, "center_crop": True}
    return read_token_config(checkpoint, UniVlaConfig, LATENT_HORIZON, usual)
