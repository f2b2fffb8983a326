"""What an OpenVLA checkpoint does not say about itself; a file may, or a default does."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qvla_export.policies.prismatic.config import PrismaticConfig, read_token_config
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.policy_interface import (
    AUTOREGRESSIVE,
    CONFIG_NAME,
)


@dataclass(frozen=True)
class OpenVlaConfig(PrismaticConfig):
    """Inputs and vocabulary of one OpenVLA checkpoint: one camera, one action, no state."""

    # Tells it from an OpenVLA-OFT with a token head, whose tokens come all at once.
    head: Literal["autoregressive"] = "autoregressive"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("head", (AUTOREGRESSIVE,))
        if len(self.cameras) != 1 or self.horizon != 1 or self.state_dim:
            raise CheckpointError(
                "an OpenVLA policy sees one camera, puts out one action and takes no state, got "
                f"{self}"
            )


def load_config(checkpoint: Path, preset: str | None = None) -> OpenVlaConfig:
    """Read `qvla_policy.json` beside a checkpoint's weights; where it is absent, take defaults.

    The default is OpenVLA as published: see `token_interface`; 16 heads in each tower, no crop.

    Raises:
        CheckpointError: a preset is named, or the file is malformed.
    """
    if preset is not None:
        raise CheckpointError(
            f"{checkpoint} has no action head of its own, so it is an OpenVLA checkpoint; preset "
            f"{preset!r} is for OpenVLA-OFT's: leave it out, or bring the head's file. An "
            f"OpenVLA-OFT with a token head says so in {CONFIG_NAME}"
        )
    return read_token_config(checkpoint, OpenVlaConfig)
