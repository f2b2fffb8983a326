"""The shapes of a pi0 or pi0.5 network, read off its weights."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor
from transformers import SiglipVisionConfig

from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.spec import FlowSpec
from qvla_export.policies.flow.tower import read_tower, tower_width
from qvla_export.policies.pi.architecture import PiArchitecture
from qvla_export.policies.pi.config import PUBLISHED_HEADS, PUBLISHED_WIDTH
from qvla_export.policies.pi.keys import EMBEDDING
from qvla_export.shared.errors import CheckpointError

_TOWER_REMEDY = (
    "write vision_heads into qvla_policy.json (the published tower has "
    f"{PUBLISHED_HEADS} at width {PUBLISHED_WIDTH})"
)


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


def _siglip(weights: Mapping[str, Tensor], heads: int) -> SiglipVisionConfig:
    if not heads and tower_width(weights) == PUBLISHED_WIDTH:
        heads = PUBLISHED_HEADS
    return read_tower(weights, heads, _TOWER_REMEDY)


def _gemma(weights: Mapping[str, Tensor], name: str, depth_mark: str) -> StackSize:
    """Read one stack's shapes; every published one has a single head of keys and values."""
    block = f"{name}.layers.0"
    head_dim = weights[f"{block}.self_attn.k_proj.weight"].shape[0]
    rows, width = weights[f"{block}.self_attn.q_proj.weight"].shape
    mlp = weights[f"{block}.mlp.up_proj.weight"].shape[0]
    return StackSize(
        width=width,
        depth=_depth(weights, f"{name}.", depth_mark),
        mlp=mlp,
        heads=rows // head_dim,
        kv_heads=1,
        head_dim=head_dim,
    )


def _depth(weights: Mapping[str, Tensor], prefix: str, mark: str) -> int:
    return len({n for n in weights if n.startswith(f"{prefix}layers.") and n.endswith(f".{mark}")})
