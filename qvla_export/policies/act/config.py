"""What config.json of an ACT checkpoint says of its network; what is not built here is refused."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.lerobot.lerobot_config import (
    LeRobotConfig,
    require_built,
    require_policy_type,
)

# Field -> the only value that is computed here (lerobot 0.6.1's default), and what it means.
_BUILT: Mapping[str, tuple[Any, str]] = {
    "n_obs_steps": (1, "observations that the policy sees"),
    "pre_norm": (False, "norms before attention"),
    "feedforward_activation": ("relu", "the activation"),
    "replace_final_stride_with_dilation": (False, "dilation in the backbone"),
}
_MOST = 4096


@dataclass(frozen=True)
class ActConfig:
    """Sizes of the network that weights do not show."""

    # Actions of a chunk.
    horizon: int
    heads: int
    encoder_layers: int
    decoder_layers: int


def read_act_config(config: LeRobotConfig) -> ActConfig:
    """Return what an ACT checkpoint's config.json says.

    Raises:
        CheckpointError: the network has a part that is not built here.
        ArtifactError: a field is missing or malformed.
    """
    require_policy_type(config, "act")
    node = config.node
    require_built(node, _BUILT)
    if not config.cameras:
        raise CheckpointError(f"{node.file}: an ACT policy needs pictures, it takes none")
    if config.blank_cameras:
        raise CheckpointError(f"{node.file}: an ACT policy has no blank cameras; leave them out")
    sizes = {(camera.height, camera.width) for camera in config.cameras.values()}
    if len(sizes) > 1:
        raise CheckpointError(
            f"{node.file}: pictures of all cameras must be of one size, got {sorted(sizes)}; "
            "train on pictures that were brought to one size"
        )
    horizon = node.field("chunk_size").whole(1, _MOST)
    return ActConfig(
        horizon=horizon,
        heads=node.field("n_heads").whole(1, _MOST),
        encoder_layers=node.field("n_encoder_layers").whole(1, _MOST),
        decoder_layers=node.field("n_decoder_layers").whole(1, _MOST),
    )
