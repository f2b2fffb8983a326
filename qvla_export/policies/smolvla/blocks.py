"""Blocks of SmolVLA's language model and of its expert, which reads the former's keys.

Source: lerobot 0.6.1 `policies/smolvla/smolvlm_with_expert.py`. Rotations have base 10,000 whatever
the VLM's config.json says. What modules take is made of tensors and tuples, so that partial passes
see whether it has changed.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qvla_export.policies.smolvla.architecture import StackSize

# Added to scores of positions that are not attended to; exp of it is 0, and float16 holds it.
HIDDEN_SCORE = -30000.0
_ROPE_BASE = 10000.0


class SmolKeysValues(NamedTuple):
    """Keys and values of one block, keys rotated.  [B, key-value heads, N, head dim]"""

    keys: Tensor
    values: Tensor


class SmolPlaces(NamedTuple):
    """Where positions stand, and what they may see."""

    # Cosines and sines of the rotation.  [B, 1, N, head dim]
    cosines: Tensor
    sines: Tensor
    # Added to scores, [B or 1, 1, N, all that may be seen]; None where everything is.
    scores: Tensor | None


class RootMeanNorm(nn.Module):
    """Root mean square norm, times a weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self._eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Norm the last axis."""
        scale = torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + self._eps)
        return hidden * scale * self.weight


class _Heads(nn.Module):
    """What attention and its keys share: cutting rows into heads."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self.size = size

    def split(self, rows: Tensor) -> Tensor:
        """Return [B, heads, N, head dim] of [B, N, heads * head dim]."""
        batch, places, _ = rows.shape
        return rows.reshape(batch, places, -1, self.size.head_dim).transpose(1, 2)

    def attend(self, queries: Tensor, seen: SmolKeysValues, scores: Tensor | None) -> Tensor:
        """Return what queries [B, heads, N, head dim] take from what they see, [B, N, rows]."""
        size, batch, rows = self.size, queries.shape[0], queries.shape[2]
        # Queries that share keys and values stand below each other: nothing is repeated.
        group = (batch, size.kv_heads, size.heads // size.kv_heads * rows, size.head_dim)
        found = queries.reshape(group) @ seen.keys.transpose(2, 3) * size.head_dim**-0.5
        found = found.reshape(batch, size.heads, rows, -1)
        if scores is not None:
            found = found + scores
        weights = found.softmax(dim=-1).reshape(*group[:3], -1)
        mixed: Tensor = (weights @ seen.values).reshape(batch, size.heads, rows, size.head_dim)
        return mixed.transpose(1, 2).reshape(batch, rows, -1)


class SmolKeyValueRows(_Heads):
    """The keys and values of a block."""

    def __init__(self, size: StackSize) -> None:
        super().__init__(size)
        rows = size.kv_heads * size.head_dim
        self.k_proj = nn.Linear(size.width, rows, bias=False)
        self.v_proj = nn.Linear(size.width, rows, bias=False)

    def keys_values(self, hidden: Tensor, places: SmolPlaces) -> SmolKeysValues:
        """Return those of positions [B, N, width]."""
        keys = rotated(self.split(self.k_proj(hidden)), places)
        return SmolKeysValues(keys, self.split(self.v_proj(hidden)))


class SmolSelfAttention(SmolKeyValueRows):
    """Attention among positions, and to what came before them."""

    def __init__(self, size: StackSize) -> None:
        super().__init__(size)
        rows = size.heads * size.head_dim
        self.q_proj = nn.Linear(size.width, rows, bias=False)
        self.o_proj = nn.Linear(rows, size.width, bias=False)

    def forward(self, hidden: Tensor, seen: SmolKeysValues, places: SmolPlaces) -> Tensor:
        """Return what each position takes of `seen`, the positions themselves last."""
        queries = rotated(self.split(self.q_proj(hidden)), places)
        mixed: Tensor = self.o_proj(self.attend(queries, seen, places.scores))
        return mixed


class SmolCrossAttention(_Heads):
    """The expert's attention to the VLM alone: its keys are maps of the VLM's keys."""

    def __init__(self, size: StackSize) -> None:
        super().__init__(size)
        rows, shared = size.heads * size.head_dim, size.kv_heads * size.head_dim
        self.q_proj = nn.Linear(size.width, rows, bias=False)
        self.o_proj = nn.Linear(rows, size.width, bias=False)
        self.key = nn.Linear(shared, shared, bias=False)
        self.value = nn.Linear(shared, shared, bias=False)

    def keys_values(self, kept: SmolKeysValues) -> SmolKeysValues:
        """Return the expert's keys and values of the VLM's: they were rotated before."""
        parts = (kept.keys, self.key), (kept.values, self.value)
        keys, values = (self.split(layer(rows.transpose(1, 2).flatten(2))) for rows, layer in parts)
        return SmolKeysValues(keys, values)

    def forward(self, hidden: Tensor, seen: SmolKeysValues, places: SmolPlaces) -> Tensor:
        """Return what each position takes of `seen`."""
        queries = rotated(self.split(self.q_proj(hidden)), places)
        mixed: Tensor = self.o_proj(self.attend(queries, seen, places.scores))
        return mixed


class GatedMlp(nn.Module):
    """Gated MLP with SiLU."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.mlp, bias=False)
        self.up_proj = nn.Linear(size.width, size.mlp, bias=False)
        self.down_proj = nn.Linear(size.mlp, size.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [B, N, width]."""
        gate = nn.functional.silu(self.gate_proj(hidden))
        mapped: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return mapped


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to what it reads."""

    def __init__(self, size: StackSize, crosses: bool = False) -> None:
        super().__init__()
        self.self_attn = SmolCrossAttention(size) if crosses else SmolSelfAttention(size)
        self.mlp = GatedMlp(size)
        self.input_layernorm = RootMeanNorm(size.width, size.eps)
        self.post_attention_layernorm = RootMeanNorm(size.width, size.eps)

    def forward(
        self, hidden: Tensor, places: SmolPlaces, past: SmolKeysValues | None = None
    ) -> tuple[Tensor, SmolKeysValues]:
        """Return the next block's hidden states, and what the positions saw.

        Args:
            hidden: [B, N, width]
            places: of the positions.
            past: what is seen before them; all that a crossing block sees. None for nothing.
        """
        normed, attention = self.input_layernorm(hidden), self.self_attn
        if isinstance(attention, SmolCrossAttention):
            assert past is not None
            seen = past
        else:
            seen = attention.keys_values(normed, places)
            seen = seen if past is None else joined(past, seen)
        hidden = hidden + attention(normed, seen, places)
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), seen


class SmolLastPrefixBlock(nn.Module):
    """The language model's last block: its keys and values are read, its states by nobody."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self.self_attn = SmolKeyValueRows(size)
        self.input_layernorm = RootMeanNorm(size.width, size.eps)

    def forward(self, hidden: Tensor, places: SmolPlaces) -> SmolKeysValues:
        """Return keys and values of hidden states [B, N, width]."""
        return self.self_attn.keys_values(self.input_layernorm(hidden), places)


def joined(past: SmolKeysValues, here: SmolKeysValues) -> SmolKeysValues:
    """Return keys and values of positions behind others."""
    return SmolKeysValues(
        torch.cat([past.keys, here.keys], dim=2), torch.cat([past.values, here.values], dim=2)
    )


def rotated(heads: Tensor, places: SmolPlaces) -> Tensor:
    """Rotate halves against each other (RoPE).  [B, heads, N, head dim]"""
    first, second = heads.chunk(2, dim=-1)
    return heads * places.cosines + torch.cat([-second, first], dim=-1) * places.sines


def rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions int64 [B, N]: float32 [B, 1, N, head dim] each."""
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / _ROPE_BASE ** (steps / head_dim)
    angles = positions[:, None, :, None].to(torch.float32) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def hidden_scores(seen: Tensor) -> Tensor:
    """Return what hides positions when it is added to scores: 0 where `seen`."""
    return (~seen).to(torch.float32) * HIDDEN_SCORE
