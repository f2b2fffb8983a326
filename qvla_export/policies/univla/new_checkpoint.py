"""A new, untrained UniVLA checkpoint of any size, in the published layout."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from qvla_export.policies.prismatic.new_checkpoint import NetworkSize, new_shapes, save_description
from qvla_export.policies.univla.architecture import DecoderShape, UniVlaArchitecture
from qvla_export.policies.univla.checkpoint import save_module
from qvla_export.policies.univla.config import UniVlaConfig, save_config
from qvla_export.policies.univla.module import UniVlaModule
from qvla_export.shared.artifacts import new_folder


def new_module(size: NetworkSize, config: UniVlaConfig, seed: int) -> UniVlaModule:
    """Return a randomly initialized network; its action decoder is as wide as its decoder."""
    torch.manual_seed(seed)
    heads = config.decoder_heads or max(1, size.hidden_dim // 64)
    arch = UniVlaArchitecture(
        **vars(new_shapes(size, config.vision_heads)),
        horizon=config.horizon,
        action_dim=config.action_dim,
        latent_tokens=config.latent_tokens,
        codebook=config.codebook,
        decoder=DecoderShape(size.hidden_dim, heads, 4 * size.hidden_dim),
    )
    return UniVlaModule(arch)


def save_checkpoint(
    path: Path,
    module: UniVlaModule,
    config: UniVlaConfig,
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
