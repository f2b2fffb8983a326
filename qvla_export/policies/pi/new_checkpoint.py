"""A new, untrained pi0 or pi0.5 checkpoint of any size, in openpi's PyTorch layout."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from qvla_export.policies.flow.new_checkpoint import FlowSize
from qvla_export.policies.pi.architecture import PiArchitecture
from qvla_export.policies.pi.config import PiConfig
from qvla_export.policies.pi.keys import our_name, upstream_shapes
from qvla_export.policies.pi.loading import TOKENIZER
from qvla_export.policies.pi.module import PiModule
from qvla_export.policies.prismatic import new_checkpoint
from qvla_export.shared.artifacts import new_folder, write_json
from qvla_export.shared.policy_interface import save_policy_config

_SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>")


def new_module(size: FlowSize, config: PiConfig, seed: int) -> PiModule:
    """Return a randomly initialized network."""
    torch.manual_seed(seed)
    language, expert = size.stacks(kv_heads=1)
    arch = PiArchitecture(
        siglip=size.tower(config.vision_heads),
        language=language,
        expert=expert,
        vocab_size=size.vocab_size,
        action_width=size.action_width,
        state_width=0 if config.adaptive else size.action_width,
        flow=config.flow,
    )
    return PiModule(arch).eval().requires_grad_(False)


def train_tokenizer(prompts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of the prompts with PaliGemma's special tokens."""
    return new_checkpoint.train_tokenizer(prompts, vocab_size, _SPECIAL, "<bos>")


def save_checkpoint(
    path: Path,
    module: PiModule,
    config: PiConfig,
    tokenizer: Tokenizer,
    statistics: Mapping[str, Any],
    stored: torch.dtype = torch.float32,
) -> None:
    """Write a whole checkpoint folder, atomically.

    Args:
        path: the folder to create or replace.
        module: the network; what upstream stores and never reads is zeros.
        config: written as `qvla_policy.json`.
        tokenizer: written as `tokenizer.json`.
        statistics: asset -> {"state": {...}, "actions": {...}}.
        stored: type of the weights in the file.
    """
    own = module.state_dict()
    shapes = upstream_shapes(module.arch, own)
    tensors = {
        key: (own[our_name(key)] if our_name(key) in own else torch.zeros(empty.shape)).to(
            stored, copy=True
        )
        for key, empty in shapes.items()
    }
    with new_folder(path) as folder:
        save_file(tensors, folder / "model.safetensors")
        description = {
            "action_dim": module.arch.action_width,
            "action_horizon": config.horizon,
            "paligemma_variant": "other",
            "action_expert_variant": "other",
            "precision": str(stored).removeprefix("torch."),
        }
        (folder / "config.json").write_text(json.dumps(description, indent=1))
        for asset, table in statistics.items():
            (folder / "assets" / asset).mkdir(parents=True)
            write_json(folder / "assets" / asset / "norm_stats.json", {"norm_stats": table})
        tokenizer.save(str(folder / TOKENIZER))
        save_policy_config(config, folder)
