"""The shapes of a pi0 or pi0.5 network, read off its weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import SiglipVisionConfig

from qvla_export.policies.flow import FlowSpec
from qvla_export.policies.pi.architecture import GemmaSize, PiArchitecture
from qvla_export.policies.pi.keys import EMBEDDING
from qvla_export.shared.errors import CheckpointError

_VISION_EPS = 1e-6
# Width and heads of PaliGemma's tower, So400m.
_PUBLISHED_WIDTH, _PUBLISHED_HEADS = 1152, 16


def read_architecture(
    checkpoint: Path, vision_heads: int, flow: FlowSpec, weights: Mapping[str, Tensor]
) -> PiArchitecture:
    """Return the shapes of a checkpoint's network; names of variants are not looked at.

    Args:
        checkpoint: names it in errors.
        vision_heads: of SigLIP, which weights do not show; 0 for those of its published size.
        flow: how it is integrated.
        weights: our parameter names -> tensors, whose shapes alone are looked at.

    Raises:
        CheckpointError: a weight that tells a shape is missing, or shapes contradict each other.
    """
    try:
        language = _gemma(weights, "language_model", depth_mark="input_layernorm.weight")
        expert = _gemma(weights, "action_expert", depth_mark="mlp.up_proj.weight")
        arch = PiArchitecture(
            siglip=_siglip(weights, vision_heads),
            language=language,
            expert=expert,
            vocab_size=weights[EMBEDDING].shape[0],
            action_width=weights["action_in_proj.weight"].shape[1],
            state_width=weights["state_proj.weight"].shape[1]
            if "state_proj.weight" in weights
            else 0,
            flow=flow,
        )
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{checkpoint}: weights are missing that tell the network's shape ({error}); is it a "
            "whole pi0 or pi0.5 checkpoint in PyTorch's layout?"
        ) from error
    shared = ("depth", "heads", "kv_heads", "head_dim")
    if odd := [n for n in shared if getattr(language, n) != getattr(expert, n)]:
        raise CheckpointError(
            f"{checkpoint}: language model and action expert must agree in {', '.join(odd)} to "
            f"share attention, got {language} and {expert}"
        )
    return arch


def siglip_config(
    width: int, depth: int, heads: int, mlp: int, patch: int, image_size: int
) -> SiglipVisionConfig:
    """Return transformers' configuration of PaliGemma's tower: GELU by tanh, no pooling head.

    Raises:
        CheckpointError: the heads do not divide the width.
    """
    if heads < 1 or width % heads:
        raise CheckpointError(
            f"SigLIP's width {width} does not divide into {heads} heads; write vision_heads into "
            f"qvla_policy.json (the published tower has {_PUBLISHED_HEADS} at width "
            f"{_PUBLISHED_WIDTH})"
        )
    config = SiglipVisionConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=image_size,
        patch_size=patch,
        layer_norm_eps=_VISION_EPS,
        hidden_act="gelu_pytorch_tanh",
        vision_use_head=False,
    )
    config._attn_implementation = "sdpa"
    return config


def _siglip(weights: Mapping[str, Tensor], heads: int) -> SiglipVisionConfig:
    kernel = weights["vision_tower.embeddings.patch_embedding.weight"].shape
    positions = weights["vision_tower.embeddings.position_embedding.weight"].shape[0]
    if not heads and kernel[0] == _PUBLISHED_WIDTH:
        heads = _PUBLISHED_HEADS
    return siglip_config(
        width=kernel[0],
        depth=_depth(weights, "vision_tower.encoder.", "layer_norm1.weight"),
        heads=heads,
        mlp=weights["vision_tower.encoder.layers.0.mlp.fc1.weight"].shape[0],
        patch=kernel[-1],
        image_size=kernel[-1] * round(positions**0.5),
    )


def _gemma(weights: Mapping[str, Tensor], name: str, depth_mark: str) -> GemmaSize:
    """Read one stack's shapes; every published one has a single head of keys and values."""
    block = f"{name}.layers.0"
    head_dim = weights[f"{block}.self_attn.k_proj.weight"].shape[0]
    rows, width = weights[f"{block}.self_attn.q_proj.weight"].shape
    mlp = weights[f"{block}.mlp.up_proj.weight"].shape[0]
    return GemmaSize(
        width=width,
        depth=_depth(weights, f"{name}.", depth_mark),
        mlp=mlp,
        heads=rows // head_dim,
        kv_heads=1,
        head_dim=head_dim,
    )


def _depth(weights: Mapping[str, Tensor], prefix: str, mark: str) -> int:
    return len({n for n in weights if n.startswith(f"{prefix}layers.") and n.endswith(f".{mark}")})
