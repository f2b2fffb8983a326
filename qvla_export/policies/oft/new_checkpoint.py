"""A new, untrained OpenVLA-OFT checkpoint of any size, in the published layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.oft.checkpoint import save_module
from qvla_export.policies.oft.config import OftConfig, save_config
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize, new_shapes, save_description
from qvla_export.shared.artifacts import new_folder


def new_module(size: NetworkSize, config: OftConfig, seed: int) -> OftModule:
    """Return a randomly initialized network."""
    torch.manual_seed(seed)
    arch = OftArchitecture(
        **vars(new_shapes(size, config.vision_heads)),
        horizon=config.horizon,
        action_dim=config.action_dim,
        state_dim=config.state_dim,
        head=config.head,
        head_dim=size.hidden_dim,
        stop_token_id=config.stop_token_id,
        diffusion_train_steps=config.diffusion_train_steps,
        diffusion_steps=config.diffusion_steps,
    )
    return OftModule(arch)


def save_checkpoint(
    path: Path,
    module: OftModule,
    config: OftConfig,
    tokenizer: Tokenizer,
    statistics: Mapping[str, Any],
    step: int,
) -> None:
    """Write a whole checkpoint folder in the published layout, atomically.

    Args:
        path: the folder to create or replace.
        module: the network.
        config: written as `qvla_policy.json`.
        tokenizer: written as `tokenizer.json`.
        statistics: data set name -> {"action": {...}, "proprio": {...}}.
        step: training step, part of the head files' names.
    """
    with new_folder(path) as folder:
        save_module(module, folder, step)
        save_description(folder, module.arch, tokenizer, statistics)
        save_config(config, folder)
