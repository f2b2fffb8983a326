"""Read SmolVLA checkpoints of LeRobot: which tensors are used, and the shapes that they say."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.tower import read_tower
from qvla_export.policies.lerobot.weights import open_weights
from qvla_export.policies.prismatic.network import load_network
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.policies.smolvla.architecture import SmolVlaArchitecture
from qvla_export.policies.smolvla.config import SmolVlaConfig, VlmConfig
from qvla_export.policies.smolvla.module import SmolVlaModule
from qvla_export.policies.towers import tower_grid, tower_side
from qvla_export.shared.errors import CheckpointError

_TOWER_REMEDY = "the VLM's config.json says so, it is another VLM's"
_VLM = "vlm_with_expert.vlm."
_TEXT, _EXPERT = f"{_VLM}model.text_model.", "vlm_with_expert.lm_expert."
# How LeRobot's names begin -> how ours do.
_PREFIXES: Mapping[str, str] = {
    f"{_VLM}model.vision_model.": "vision_tower.",
    f"{_VLM}model.connector.modality_projection.proj.": "connector.",
    _TEXT: "language_model.",
    _EXPERT: "action_expert.",
}
# Of the last block of the VLM keys and values are read alone.
_LAST_UNUSED = ("self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp.*")


def load_module(
    checkpoint: Path, config: SmolVlaConfig, vlm: VlmConfig
) -> tuple[SmolVlaModule, CheckpointWeights]:
    """Build the network of a checkpoint with its weights as float32.

    Raises:
        CheckpointError: keys do not fit, the message lists every missing, unexpected and misshapen
            key; or they contradict a config.json.
    """
    last = f"{_TEXT}layers.{config.depth - 1}."
    unused = [f"{_VLM}lm_head.*", f"{_TEXT}norm.*", *(f"{last}{part}*" for part in _LAST_UNUSED)]
    weights = _renamed(open_weights(checkpoint, unused), config)
    arch = _architecture(checkpoint, config, vlm, weights.shapes)
    module = load_network(checkpoint, lambda: SmolVlaModule(arch), weights, resident=True)
    return module, weights


def _renamed(weights: CheckpointWeights, config: SmolVlaConfig) -> CheckpointWeights:
    names = {name: _our_name(name, config) for name in weights.shapes}
    return replace(
        weights,
        shapes={names[name]: tensor for name, tensor in weights.shapes.items()},
        places={names[name]: place for name, place in weights.places.items()},
    )


def upstream_name(name: str) -> str:
    """Return LeRobot's name, without `model.`, of one of our parameters."""
    for theirs, ours in _PREFIXES.items():
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
            break
    return name.replace(".key.", ".k_proj.").replace(".value.", ".v_proj.")


def _our_name(name: str, config: SmolVlaConfig) -> str:
    for theirs, ours in _PREFIXES.items():
        if name.startswith(theirs):
            name = ours + name.removeprefix(theirs)
            break
    stack, _, rest = name.partition(".layers.")
    block = rest.partition(".")[0]
    crosses = block.isdigit() and int(block) % config.self_attention_every
    if stack == "action_expert" and crosses:
        # Maps of the VLM's keys and values, and no layers of one input with the queries.
        name = name.replace(".k_proj.", ".key.").replace(".v_proj.", ".value.")
    return name


def _architecture(
    checkpoint: Path, config: SmolVlaConfig, vlm: VlmConfig, shapes: Mapping[str, Tensor]
) -> SmolVlaArchitecture:
    try:
        siglip = read_tower(shapes, vlm.vision_heads, _TOWER_REMEDY, vlm.vision_eps)
        language, expert = (
            StackSize(
                width=shapes[f"{stack}.layers.0.input_layernorm.weight"].shape[0],
                depth=config.depth,
                mlp=shapes[f"{stack}.layers.0.mlp.up_proj.weight"].shape[0],
                heads=vlm.heads,
                kv_heads=vlm.kv_heads,
                head_dim=vlm.head_dim,
                eps=vlm.text_eps,
            )
            for stack in ("language_model", "action_expert")
        )
        vocabulary = shapes["language_model.embed_tokens.weight"].shape[0]
    except (KeyError, IndexError) as error:
        raise CheckpointError(
            f"{checkpoint}: weights are missing that tell the network's shape ({error}); is it a "
            "whole SmolVLA checkpoint?"
        ) from error
    side = tower_side(siglip)
    if config.picture != (side, side) or tower_grid(siglip) % vlm.scale_factor:
        raise CheckpointError(
            f"{checkpoint}: pictures are brought to {config.picture} (width, height), the tower's "
            f"positions are of {side} x {side} in blocks of {vlm.scale_factor}; other sizes are "
            "not built here"
        )
    return SmolVlaArchitecture(
        siglip=siglip,
        scale_factor=vlm.scale_factor,
        language=language,
        expert=expert,
        vocab_size=vocabulary,
        self_attention_every=config.self_attention_every,
        action_width=config.action_width,
        state_width=config.state_width,
        flow=config.flow,
    )
