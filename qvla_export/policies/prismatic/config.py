"""What a checkpoint's config.json does not say, whatever the family."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.pictures.picture_bounds import MOST_INPUT_SIDE
from qvla_export.shared.policy_interface import (
    CONFIG_NAME,
    PolicyInterface,
    read_policy_config,
    token_interface,
)

_MOST_HEADS = 1024
_MOST_TOKEN = (1 << 31) - 1
# Pixels of a side that can be cropped.
_LEAST_SIDE = 8
_Config = TypeVar("_Config", bound="PrismaticConfig")


@dataclass(frozen=True)
class PrismaticConfig(PolicyInterface):
    """Inputs and vocabulary of a policy on Prismatic's two towers and Llama."""

    # Attention heads of the DINOv2 and SigLIP towers: the one shape weights do not show.
    vision_heads: tuple[int, int] = (16, 16)
    # Llama-2's beginning and empty piece; other vocabularies have others.
    bos_token_id: int = 1
    suffix_token_id: int = 29871
    # Side of the frames after the JPEG + lanczos step of the training data; 0: no such step.
    training_image_size: int = 0
    center_crop: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        heads = self.vision_heads
        pair = isinstance(heads, tuple) and len(heads) == 2
        if not pair or not all(type(n) is int and 1 <= n <= _MOST_HEADS for n in heads):
            raise CheckpointError(
                f"vision_heads must be two whole numbers from 1 to {_MOST_HEADS}, got {heads!r:.80}"
            )
        self._require_whole("bos_token_id", 0, _MOST_TOKEN)
        self._require_whole("suffix_token_id", 0, _MOST_TOKEN)
        side = self.training_image_size
        if type(side) is not int or not (side == 0 or _LEAST_SIDE <= side <= MOST_INPUT_SIDE):
            raise CheckpointError(
                f"training_image_size must be 0 or {_LEAST_SIDE} to {MOST_INPUT_SIDE} pixels, "
                f"got {side!r:.80}"
            )
        if type(self.center_crop) is not bool:
            raise CheckpointError(
                f"center_crop must be true or false, got {self.center_crop!r:.80}"
            )


def read_token_config(
    checkpoint: Path,
    kind: type[_Config],
    horizon: int = 1,
    usual: Mapping[str, object] | None = None,
) -> _Config:
    """Return the configuration of a policy that decodes tokens.

    Args:
        checkpoint: its folder.
        kind: of configuration.
        horizon: as `token_interface`.
        usual: fields as such a policy was published, where `qvla_policy.json` does not say them.

    Raises:
        CheckpointError: the statistics do not tell the dimensions, or the file is malformed.
    """
    stated: dict[str, Any] = {}
    if (checkpoint / CONFIG_NAME).is_file():
        stated = read_policy_config(checkpoint)
    try:
        return kind(**{**vars(token_interface(checkpoint, horizon)), **(usual or {}), **stated})
    except TypeError as error:
        path = checkpoint / CONFIG_NAME
        raise CheckpointError(f"{path} is not a policy configuration: {error}") from error
