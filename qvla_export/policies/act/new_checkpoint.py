"""A new, untrained ACT checkpoint of any size, in LeRobot's layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qvla_export.policies.act.checkpoint import upstream_tensors
from qvla_export.policies.act.config import ActConfig
from qvla_export.policies.act.module import ActArchitecture, ActModule
from qvla_export.policies.act.resnet import BlockShape, ConvShape, FrozenBatchNorm, ResNetShape
from qvla_export.policies.lerobot.new_checkpoint import Features, save_description, save_weights
from qvla_export.shared.artifacts import new_folder


@dataclass(frozen=True)
class ActSize:
    """Widths and depths of a network; every width a multiple of 64 quantizes without padding."""

    # Channels of the backbone's four stages, of one block each.
    channels: tuple[int, int, int, int] = (16, 32, 64, 64)
    width: int = 64
    hidden: int = 128
    heads: int = 4
    encoder_layers: int = 2
    decoder_layers: int = 2
    latent_dim: int = 8
    horizon: int = 8


def new_module(size: ActSize, features: Features, seed: int) -> ActModule:
    """Return a randomly initialized network; its batch norms, which are constants, do nothing."""
    torch.manual_seed(seed)
    (picture,) = {*features.cameras.values()}
    arch = ActArchitecture(
        config=ActConfig(size.horizon, size.heads, size.encoder_layers, size.decoder_layers),
        backbone=_backbone(size.channels),
        picture=picture,
        width=size.width,
        hidden=size.hidden,
        latent_dim=size.latent_dim,
        state_dim=features.state_dim,
        action_dim=features.action_dim,
    )
    module = ActModule(arch)
    for part in module.modules():
        if isinstance(part, FrozenBatchNorm):
            part.get_buffer("weight").fill_(1.0)
            part.get_buffer("running_var").fill_(1.0)
        elif isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
    return module.eval().requires_grad_(False)


def save_checkpoint(
    path: Path,
    module: ActModule,
    features: Features,
    statistics: Mapping[str, Mapping[str, Any]],
) -> None:
    """Write a whole checkpoint folder, atomically.

    Args:
        path: the folder to create or replace.
        module: the network.
        features: what it sees and returns.
        statistics: feature -> statistic -> numbers.
    """
    config = module.arch.config
    fields = {
        "type": "act",
        "n_obs_steps": 1,
        "chunk_size": config.horizon,
        "n_action_steps": config.horizon,
        "pre_norm": False,
        "feedforward_activation": "relu",
        "replace_final_stride_with_dilation": False,
        "n_heads": config.heads,
        "n_encoder_layers": config.encoder_layers,
        "n_decoder_layers": config.decoder_layers,
        "dim_model": module.arch.width,
        "dim_feedforward": module.arch.hidden,
        "use_vae": False,
        "temporal_ensemble_coeff": None,
    }
    with new_folder(path) as folder:
        save_description(folder, features, fields, statistics)
        save_weights(folder, upstream_tensors(module.state_dict()))


def _backbone(channels: tuple[int, ...]) -> ResNetShape:
    stages, inputs = [], channels[0]
    for number, outputs in enumerate(channels):
        convolutions = ConvShape(inputs, outputs, 3), ConvShape(outputs, outputs, 3)
        stride = 2 if number else 1
        stages.append((BlockShape(convolutions, stride, has_downsample=number > 0),))
        inputs = outputs
    return ResNetShape(ConvShape(3, channels[0], 7), tuple(stages))
