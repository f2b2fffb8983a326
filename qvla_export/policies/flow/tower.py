"""The SigLIP tower of a policy with a flow: its configuration, read off its weights, its features.

GELU by tanh, no pooling head.
"""

from collections.abc import Mapping

from torch import Tensor
from transformers import SiglipVisionConfig, SiglipVisionModel

from qvla_export.shared.errors import CheckpointError

_PATCH = "vision_tower.embeddings.patch_embedding.weight"
_POSITIONS = "vision_tower.embeddings.position_embedding.weight"
_BLOCKS, _NORM = "vision_tower.encoder.layers.", ".layer_norm1.weight"


def read_tower(
    weights: Mapping[str, Tensor], heads: int, remedy: str, eps: float = 1e-6
) -> SiglipVisionConfig:
    """Return a tower's configuration.

    Args:
        weights: our parameter names -> tensors, whose shapes alone are looked at.
        heads: which weights do not show.
        remedy: what to do where they do not divide the width, as the end of an error.
        eps: of its norms.

    Raises:
        KeyError: a weight that tells a shape is missing.
        CheckpointError: the heads do not divide the width.
    """
    kernel, positions = weights[_PATCH].shape, weights[_POSITIONS].shape[0]
    width = kernel[0]
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"SigLIP's width {width} does not divide into {heads} heads; {remedy}"
        )
    return siglip_config(
        width=width,
        depth=len({n for n in weights if n.startswith(_BLOCKS) and n.endswith(_NORM)}),
        heads=heads,
        mlp=weights[f"{_BLOCKS}0.mlp.fc1.weight"].shape[0],
        patch=kernel[-1],
        image_size=kernel[-1] * round(positions**0.5),
        eps=eps,
    )


def siglip_config(
    width: int, depth: int, heads: int, mlp: int, patch: int, image_size: int, eps: float = 1e-6
) -> SiglipVisionConfig:
    """Return transformers' configuration of such a tower."""
    config = SiglipVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=image_size,
        patch_size=patch,
        layer_norm_eps=eps,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    config._attn_implementation = "sdpa"
    return config


def tower_width(weights: Mapping[str, Tensor]) -> int:
    """Return the width of a tower's states.

    Raises:
        KeyError: the weight that tells it is missing.
    """
    return int(weights[_PATCH].shape[0])


def patch_features(tower: SiglipVisionModel, frames: Tensor) -> Tensor:
    """Return a tower's patch features [N, patches, width] of frames [N, 3, S, S]."""
    hidden: Tensor = tower.embeddings.patch_embedding(frames).flatten(2).transpose(1, 2)
    hidden = hidden + tower.embeddings.position_embedding.weight
    for block in tower.encoder.layers:
        hidden = block(hidden, attention_mask=None)
    normed: Tensor = tower.post_layernorm(hidden)
    return normed
