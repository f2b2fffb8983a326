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

_MOST_TOKENS, _MOST_CODES, _MOST_HEADS, _MOST_SEED = 256, 1 << 16, 1024, (1 << 63) - 1
# Codes are compared with each other where tokens are drawn, and are halves' where repeated.
_MOST_DRAWN = 1024
_COLDEST, _HOTTEST, _LEAST_TOP_P = 0.01, 100.0, 0.01


@dataclass(frozen=True)
class UniVlaConfig(PrismaticConfig):
    """Inputs and vocabulary of one UniVLA checkpoint: one camera, a chunk, no state."""

    head: Literal["latent"] = "latent"
    # Tokens that are decoded for one chunk, and how many there are to choose from.
    latent_tokens: int = 4
    codebook: int = 32
    # Attention heads of the action decoder; 0 for one every 64 of its width, as published.
    decoder_heads: int = 0
    # Of the softmax that latent tokens are drawn from; 0: the likeliest is taken.
    temperature: float = 0.0
    # The smallest set of likeliest tokens with this probability is drawn from.
    top_p: float = 1.0
    # Of what they are drawn by, beside the observation.
    noise_seed: int = 0
    # Steps before, whose latent tokens the prompt repeats: none, or the last one.
    history: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_choice("head", (LATENT,))
        if len(self.cameras) != 1 or self.state_dim:
            raise CheckpointError(f"a UniVLA policy sees one camera and takes no state, got {self}")
        self._require_whole("latent_tokens", 1, _MOST_TOKENS)
        self._require_whole("codebook", 2, _MOST_CODES)
        self._require_whole("decoder_heads", 0, _MOST_HEADS)
        self._require_whole("noise_seed", 0, _MOST_SEED)
        if type(self.history) is not int or self.history not in (0, 1):
            raise CheckpointError(
                f"history must be 0, or 1 for a prompt that repeats the tokens of the step before "
                f"('History action <ACT_..>'), got {self.history!r:.80}"
            )
        for name, low, high in (("temperature", 0.0, _HOTTEST), ("top_p", _LEAST_TOP_P, 1.0)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not low <= value <= high:
                raise CheckpointError(
                    f"{name} must be a number from {low:g} to {high:g}, got {value!r:.80}"
                )
        if 0 < self.temperature < _COLDEST:
            raise CheckpointError(
                f"temperature must be 0, which takes the likeliest token, or {_COLDEST:g} to "
                f"{_HOTTEST:g}, got {self.temperature!r}"
            )
        if (self.temperature or self.history) and self.codebook > _MOST_DRAWN:
            raise CheckpointError(
                f"tokens can be drawn from a codebook of {_MOST_DRAWN} and repeated in the prompt, "
                f"got {self.codebook}; write temperature 0, which takes the likeliest, and history "
                "0"
            )
        if not self.temperature and self.top_p != 1:
            raise CheckpointError(
                f"top_p {self.top_p!r} cuts what tokens are drawn from, and at temperature 0 none "
                "is drawn; write temperature, 0.75 in UniVLA's evaluation, or leave top_p out"
            )


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
