"""Blocks of SmolVLA's language model and of its expert, which reads the former's keys.

Source: lerobot 0.6.1 `policies/smolvla/smolvlm_with_expert.py`.
"""

import torch
from torch import Tensor, nn

from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.attention import (
    GatedMlp,
    GroupedAttention,
    GroupedHeads,
    KeysValues,
    KeyValueRows,
    Places,
    joined,
    normed_states,
    rotated,
)


class RootMeanNorm(nn.Module):
    """Root mean square norm, times a weight."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self._eps = size.eps
        self.weight = nn.Parameter(torch.ones(size.width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Norm the last axis."""
        return normed_states(hidden, self._eps) * self.weight


class PrefixAttention(GroupedHeads):
    """The expert's attention to the VLM alone: its keys are maps of the VLM's keys."""

    def __init__(self, size: StackSize) -> None:
        super().__init__(size)
        rows, shared = size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.q_proj = nn.Linear(size.width, rows, bias=False)
        self.o_proj = nn.Linear(rows, size.width, bias=False)
        self.key = nn.Linear(shared, shared, bias=False)
        self.value = nn.Linear(shared, shared, bias=False)

    def keys_values(self, kept: KeysValues) -> KeysValues:
        """Return the expert's keys and values of the VLM's: they were rotated before."""
        parts = (kept.keys, self.key), (kept.values, self.value)
        keys, values = (self.split(layer(rows.transpose(1, 2).flatten(2))) for rows, layer in parts)
        return KeysValues(keys, values)

    def forward(self, hidden: Tensor, seen: KeysValues, places: Places) -> Tensor:
        """Return what each position takes of `seen`."""
        queries = rotated(self.split(self.q_proj(hidden)), places)
        mixed: Tensor = self.o_proj(self.attend(queries, seen, places.scores))
        return mixed


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to what it reads."""

    def __init__(self, size: StackSize, crosses: bool = False) -> None:
        super().__init__()
        self.self_attn = PrefixAttention(size) if crosses else GroupedAttention(size)
        self.mlp = GatedMlp(size, nn.functional.silu)
        self.input_layernorm = RootMeanNorm(size)
        self.post_attention_layernorm = RootMeanNorm(size)

    def forward(
        self, hidden: Tensor, places: Places, past: KeysValues | None = None
    ) -> tuple[Tensor, KeysValues]:
        """Return the next block's hidden states, and what the positions saw.

        Args:
            hidden: [B, N, width]
            places: of the positions.
            past: what is seen before them; all that a crossing block sees. None for nothing.
        """
        normed, attention = self.input_layernorm(hidden), self.self_attn
        if isinstance(attention, PrefixAttention):
            assert past is not None
            seen = past
        else:
            seen = attention.keys_values(normed, places)
            seen = seen if past is None else joined(past, seen)
        hidden = hidden + attention(normed, seen, places)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), seen


class LastBlock(nn.Module):
    """The language model's last block: its keys and values are read, its states by nobody."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self.self_attn = KeyValueRows(size)
        self.input_layernorm = RootMeanNorm(size)

    def forward(self, hidden: Tensor, places: Places) -> KeysValues:
        """Return keys and values of hidden states [B, N, width]."""
        return self.self_attn.keys_values(self.input_layernorm(hidden), places)
