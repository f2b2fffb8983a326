"""A new, untrained OpenVLA checkpoint of any size, in the published layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from qvla_export.policies.openvla.architecture import OpenVlaArchitecture
from qvla_export.policies.openvla.checkpoint import save_module
from qvla_export.policies.openvla.config import OpenVlaConfig, save_config
from qvla_export.policies.openvla.module import OpenVlaModule
from qvla_export.policies.prismatic.loading import token_centers
from qvla_export.policies.prismatic.new_checkpoint import NetworkSize, new_shapes, save_description
from qvla_export.shared.artifacts import new_folder

_BINS = 256


def new_module(size: NetworkSize, config: OpenVlaConfig, seed: int) -> OpenVlaModule:
    """Return a randomly initialized network; the vocabulary's last 256 ids are its actions'."""
    torch.manual_seed(seed)
    shapes = new_shapes(size, config.vision_heads)
    arch = OpenVlaArchitecture(**vars(shapes), action_dim=config.action_dim, action_tokens=_BINS)
    return OpenVlaModule(arch, token_centers(_BINS))


def save_checkpoint(
    path: Path,
    module: OpenVlaModule,
    config: OpenVlaConfig,
    tokenizer: Tokenizer,
    statistics: Mapping[str, Any],
) -> None:
    """Write a whole checkpoint folder in the published layout, atomically.

    Args:
        path: the folder to create or replace.
        module: the network.
        config: written as `qvla_policy.json`.
        tokenizer: written as `tokenizer.json`.
        statistics: data set name -> {"action": {...}}.
    """
    with new_folder(path) as folder:
        save_module(module, folder)
        save_description(folder, module.arch, tokenizer, statistics)
        save_config(config, folder)
