"""A new, untrained SmolVLA checkpoint of any size, in LeRobot's layout, the VLM's files within."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from qvla_export.policies.flow.new_checkpoint import FlowSize
from qvla_export.policies.flow.spec import FlowSpec
from qvla_export.policies.lerobot.new_checkpoint import Features, save_description, save_weights
from qvla_export.policies.smolvla.architecture import SmolVlaArchitecture
from qvla_export.policies.smolvla.checkpoint import upstream_name
from qvla_export.policies.smolvla.config import STEPS, TOKENIZER, VLM_FOLDER
from qvla_export.policies.smolvla.module import SmolVlaModule
from qvla_export.shared.artifacts import new_folder

_PROMPT_TOKENS = 48


@dataclass(frozen=True)
class SmolVlaSize(FlowSize):
    """Widths and depths of a network, and what its configuration says."""

    # Side of the blocks of patches that become one token.
    scale_factor: int = 2
    vision_heads: int = 4
    kv_heads: int = 2
    horizon: int = 8
    flow_steps: int = 10


def new_module(size: SmolVlaSize, seed: int) -> SmolVlaModule:
    """Return a randomly initialized network."""
    torch.manual_seed(seed)
    language, expert = size.stacks(size.kv_heads, eps=1e-5)
    arch = SmolVlaArchitecture(
        siglip=size.tower(size.vision_heads),
        scale_factor=size.scale_factor,
        language=language,
        expert=expert,
        vocab_size=size.vocab_size,
        self_attention_every=2,
        action_width=size.action_width,
        state_width=size.action_width,
        flow=FlowSpec(size.flow_steps, "computed"),
    )
    return SmolVlaModule(arch).eval().requires_grad_(False)


def save_checkpoint(
    path: Path,
    module: SmolVlaModule,
    horizon: int,
    features: Features,
    tokenizer: Tokenizer,
    statistics: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a whole checkpoint folder, atomically.

    Args:
        path: the folder to create or replace.
        module: the network.
        horizon: actions of a chunk.
        features: what it sees and returns.
        tokenizer: of the VLM.
        statistics: feature -> statistic -> numbers.
    """
    new_line, words = STEPS
    how = {"max_length": _PROMPT_TOKENS, "padding_side": "right", "truncation": True}
    steps = [
        {"registry_name": new_line, "config": {}},
        {"registry_name": words, "config": how},
    ]
    with new_folder(path) as folder:
        save_description(folder, features, _fields(module, horizon), statistics, steps)
        own = module.state_dict()
        save_weights(folder, {upstream_name(name): tensor for name, tensor in own.items()})
        vlm = folder / VLM_FOLDER
        vlm.mkdir()
        tokenizer.save(str(vlm / TOKENIZER))
        (vlm / "config.json").write_text(json.dumps(_vlm_config(module.arch), indent=1))


def _fields(module: SmolVlaModule, horizon: int) -> dict[str, Any]:
    arch = module.arch
    return {
        "type": "smolvla",
        "n_obs_steps": 1,
        "chunk_size": horizon,
        "n_action_steps": horizon,
        "adapt_to_pi_aloha": False,
        "use_delta_joint_actions_aloha": False,
        "add_image_special_tokens": False,
        "attention_mode": "cross_attn",
        "num_vlm_layers": arch.language.depth,
        "num_expert_layers": 0,
        "self_attn_every_n_layers": arch.self_attention_every,
        "resize_imgs_with_padding": [arch.image_side, arch.image_side],
        "min_period": arch.flow.min_period,
        "max_period": arch.flow.max_period,
        "num_steps": arch.flow.steps,
        "max_state_dim": arch.state_width,
        "max_action_dim": arch.action_width,
        "tokenizer_max_length": _PROMPT_TOKENS,
        "vlm_model_name": VLM_FOLDER,
    }


def _vlm_config(arch: SmolVlaArchitecture) -> dict[str, Any]:
    size, tower = arch.language, arch.siglip
    text = {
        "model_type": "llama",
        "hidden_act": "silu",
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "hidden_size": size.width,
        "rms_norm_eps": size.eps,
    }
    vision = {
        "num_attention_heads": tower.num_attention_heads,
        "layer_norm_eps": tower.layer_norm_eps,
        "hidden_act": tower.hidden_act,
    }
    return {
        "model_type": "smolvlm",
        "scale_factor": arch.scale_factor,
        "text_config": text,
        "vision_config": vision,
    }
