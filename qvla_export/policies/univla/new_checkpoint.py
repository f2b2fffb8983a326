"""A new, untrained UniVLA network of any size, and its tokenizer."""

from collections.abc import Iterable

import torch
from tokenizers import Tokenizer

from qvla_export.policies.prismatic.new_checkpoint import NetworkSize, new_shapes, train_tokenizer
from qvla_export.policies.univla.architecture import (
    DecoderShape,
    UniVlaArchitecture,
    sampling_of,
)
from qvla_export.policies.univla.config import UniVlaConfig
from qvla_export.policies.univla.module import UniVlaModule


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
        sampling=sampling_of(config),
    )
    return UniVlaModule(arch)


def latent_tokenizer(prompts: Iterable[str], size: NetworkSize, codebook: int) -> Tokenizer:
    """Return a tokenizer of the prompts, with the latent tokens where the network has them."""
    tokenizer = train_tokenizer(prompts, size.vocab_size)
    fill = [f"<extra_{n}>" for n in range(size.vocab_size - tokenizer.get_vocab_size() + 1)]
    tokenizer.add_special_tokens([*fill, *(f"<ACT_{n}>" for n in range(codebook))])
    return tokenizer
