"""The `Policy` of a language model: a text in, what stands for the logits of next tokens out."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from qvla_export.policies.backbones.gguf_file import read_gguf
from qvla_export.policies.backbones.output_policy import OutputPolicy, output_statistics
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.reached_layers import linear_layers
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.frames import FrameSpec
from qvla_export.shared.processor import Processor, ProcessorSpec

_BLANK = FrameSpec(1, 1, "none", ((0.0, 0.0, 0.0),), ((1.0, 1.0, 1.0),))
# llama.cpp's names -> transformers'.
_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Fields of transformers' config -> llama.cpp's, behind "llama.".
_SIZES = {
    "vocab_size": "vocab_size",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "max_position_embeddings": "context_length",
}
_ROPE = "rope.freq_base"
_OUTSIDE = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}


class TextNetwork(nn.Module):
    """A Llama whose embedding is its output layer, too."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.language_model = LlamaModel(config)
        # See `logit_root`.  float32 [hidden, hidden]
        self.root: Tensor
        self.register_buffer("root", torch.zeros(config.hidden_size, config.hidden_size))

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return hidden states behind the last norm [B, N, hidden] of tokens [B, N]."""
        output = self.language_model(input_ids=input_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden


@dataclass(frozen=True, repr=False)
class TextPolicy(OutputPolicy):
    """A language model; see `Policy` for the meaning of its members."""

    module: TextNetwork

    def layers(self) -> dict[str, nn.Linear | nn.Conv2d]:
        """Return the linear layers of all blocks.

        Each carries the text to the output; nothing is traced, since tokens have no gradient that
        would tell a layer they reach from one of constants.
        """
        return linear_layers(self.module)

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return numbers whose squared changes are those of the logits [B, tokens, hidden].

        The squared length of a token's change is the mean over the vocabulary of the squared change
        of its logits less their mean, which softmax does not see.

        Raises:
            CheckpointError: the texts are not of one length.
        """
        return self._hidden(batch) @ self.module.root

    def token_logits(self, batch: PolicyBatch) -> Tensor | None:
        """Return the logits of every next token [B, tokens, vocabulary]."""
        return self._hidden(batch) @ self.module.language_model.embed_tokens.weight.T

    def _hidden(self, batch: PolicyBatch) -> Tensor:
        if batch.prompt_lengths is not None:
            raise CheckpointError(
                f"texts of one batch must have equally many tokens, got "
                f"{batch.prompt_lengths.tolist()}; give texts of at least "
                f"{self.processor.spec.max_prompt_tokens} tokens, which are cut to so many"
            )
        hidden: Tensor = self.module(batch.input_ids)
        return hidden


def text_policy(path: Path, camera: str, tokens: int, digest: str) -> TextPolicy:
    """Return the Llama of a GGUF file as a policy.

    Args:
        path: the file.
        camera: of the picture of one pixel beside each text.
        tokens: of a text; longer ones are cut.
        digest: of the policy.

    Raises:
        CheckpointError: the file is none of a Llama with a tied output layer.
    """
    stored = read_gguf(path)
    config = _config(path, stored.metadata)
    network = TextNetwork(config).eval()
    weights = {
        _network_name(name): torch.from_numpy(_rows(name, array, config))
        for name, array in stored.tensors.items()
    }
    network.language_model.load_state_dict(weights)
    network.root.copy_(logit_root(weights["embed_tokens.weight"]))
    network.requires_grad_(False)
    spec = ProcessorSpec(
        cameras=(camera,),
        image=_BLANK,
        horizon=tokens,
        action_dim=config.hidden_size,
        state_dim=0,
        max_prompt_tokens=tokens,
        language="line",
    )
    processor = Processor(spec, output_statistics(config.hidden_size), _tokenizer(stored.metadata))
    return TextPolicy(network, processor, digest)


def logit_root(output_layer: Tensor) -> Tensor:
    """Return R with |h R|^2 the variance over the vocabulary of the logits of h.

    Args:
        output_layer: [vocabulary, hidden]

    Returns:
        float32 [hidden, hidden]
    """
    centred = output_layer.double() - output_layer.double().mean(dim=0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
    root: Tensor = (vectors * values.clamp(min=0).sqrt()).float()
    return root


def _config(path: Path, metadata: Mapping[str, Any]) -> LlamaConfig:
    if metadata.get("general.architecture") != "llama":
        raise CheckpointError(
            f"{path} must hold a llama, it says {metadata.get('general.architecture')!r:.80}"
        )
    missing = [key for key in (*_SIZES.values(), _ROPE) if f"llama.{key}" not in metadata]
    if missing:
        raise CheckpointError(f"{path} does not say its llama's {', '.join(missing)}")
    config = LlamaConfig(
        rope_parameters={"rope_type": "default", "rope_theta": metadata[f"llama.{_ROPE}"]},
        tie_word_embeddings=True,
        **{name: metadata[f"llama.{key}"] for name, key in _SIZES.items()},
    )
    config._attn_implementation = "sdpa"
    return config


def _network_name(name: str) -> str:
    block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if block is None:
        return _OUTSIDE.get(name, name)
    return f"layers.{block[1]}.{_NAMES.get(block[2], block[2])}.weight"


def _rows(name: str, array: NDArray[np.float32], config: LlamaConfig) -> NDArray[np.float32]:
    """Undo how llama.cpp orders a head's rows for its rotation: pairs instead of halves."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return array
    pairs = array.reshape(count, -1, 2, array.shape[-1])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)


def _tokenizer(metadata: Mapping[str, Any]) -> Tokenizer:
    """Return the byte-level BPE that the file describes, digits one by one as SmolLM has them."""
    vocabulary = {word: number for number, word in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    return tokenizer
