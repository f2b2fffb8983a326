"""Read and write UniVLA checkpoints in the published on-disk layout."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from qvla_export.policies.prismatic.description import read_architecture, read_vocab_padding
from qvla_export.policies.prismatic.network import load_network
from qvla_export.policies.prismatic.new_checkpoint import save_token_body
from qvla_export.policies.prismatic.weights import CheckpointWeights
from qvla_export.policies.univla.architecture import (
    DecoderShape,
    UniVlaArchitecture,
    sampling_of,
)
from qvla_export.policies.univla.config import UniVlaConfig
from qvla_export.policies.univla.files import DECODER
from qvla_export.policies.univla.module import UniVlaModule
from qvla_export.policies.univla.weights import open_weights
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.policy_interface import CONFIG_NAME

_ACTIONS = f"{DECODER}.proj.0.weight"
_MLP = f"{DECODER}.latent_action_pool.mlp.1.weight"
_HEAD_WIDTH = 64  # of the decoder's attention, as published


def load_module(
    checkpoint: Path, config: UniVlaConfig, resident: bool = True
) -> tuple[UniVlaModule, CheckpointWeights]:
    """Build the network of a checkpoint, with its weights as float32 or (device "meta") without.

    Raises:
        CheckpointError: keys do not fit; the message lists every missing, unexpected and misshapen
            key. Or a file of weights would not be used.
    """
    weights = open_weights(checkpoint, read_vocab_padding(checkpoint), config.codebook)
    shapes = read_architecture(checkpoint, config.vision_heads, weights.shapes)
    arch = UniVlaArchitecture(
        **vars(shapes),
        horizon=config.horizon,
        action_dim=config.action_dim,
        latent_tokens=config.latent_tokens,
        codebook=config.codebook,
        decoder=_decoder(checkpoint, config, weights.shapes),
        sampling=sampling_of(config),
    )
    return load_network(checkpoint, lambda: UniVlaModule(arch), weights, resident), weights


def _decoder(checkpoint: Path, config: UniVlaConfig, shapes: Mapping[str, Tensor]) -> DecoderShape:
    """Read the action decoder's shape off its weights.

    Raises:
        CheckpointError: it has none, or makes another chunk than the configuration says.
    """
    missing = [name for name in (_ACTIONS, _MLP) if name not in shapes]
    if missing:
        raise CheckpointError(f"{checkpoint} has no weights {missing} of its action decoder")
    numbers, width = shapes[_ACTIONS].shape
    if numbers != config.horizon * config.action_dim:
        raise CheckpointError(
            f"{checkpoint}: the action decoder puts out {numbers} numbers, not {config.horizon} "
            f"actions of {config.action_dim}; write horizon and action_dim into {CONFIG_NAME}"
        )
    heads = config.decoder_heads or max(1, width // _HEAD_WIDTH)
    if width % heads:
        raise CheckpointError(
            f"{checkpoint}: the action decoder's width {width} does not divide into {heads} heads; "
            f"write decoder_heads into {CONFIG_NAME}"
        )
    return DecoderShape(width, heads, shapes[_MLP].shape[1])


def save_module(module: UniVlaModule, checkpoint: Path) -> None:
    """Write weights into an existing folder as upstream does: body, float32 action decoder."""
    body, decoder = {}, {}
    for name, tensor in module.state_dict().items():
        if name.startswith(f"{DECODER}."):
            decoder[name.removeprefix(f"{DECODER}.")] = tensor
        else:
            body[name] = tensor
    save_token_body(body, module.arch, module.vocabulary.first, checkpoint)
    torch.save(decoder, checkpoint / f"{DECODER}.pt")
