"""A new, untrained OpenVLA-OFT checkpoint of any size, in the published layout."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.oft.checkpoint import save_module
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.prismatic import new_checkpoint
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize, new_shapes
from qvla_export.policies.prismatic.pretrained import TowerChoice


def new_module(size: NetworkSize, config: OftConfig, seed: int) -> OftModule:
    """Return a network, randomly initialized but for a pretrained tower that its size names.

    Raises:
        CheckpointError: the pretrained tower is not installed.
    """
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
    module = OftModule(arch)
    if choice := size.pretrained:
        tower = {**choice.tensors(), **choice.own_tensors(size.image_size)}
        module.load_state_dict(tower, strict=False)
    return module


def save_checkpoint(
    path: Path,
    module: OftModule,
    config: OftConfig,
    tokenizer: Tokenizer,
    statistics: Mapping[str, Any],
    step: int,
    pretrained: TowerChoice | None = None,
) -> None:
    """Write a whole checkpoint folder; `step` of training is part of the head files' names.

    Args:
        path, config, tokenizer, statistics: see `prismatic.new_checkpoint.save_checkpoint`.
        module: the network.
        step: of training.
        pretrained: the tower that is named in the folder instead of stored.
    """
    save_weights = partial(save_module, module, step=step, pretrained=pretrained)
    new_checkpoint.save_checkpoint(path, save_weights, module.arch, config, tokenizer, statistics)
