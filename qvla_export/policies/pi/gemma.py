"""Gemma blocks of which two stacks share attention: the second reads the first one's keys.

Source: openpi `models_pytorch/gemma_pytorch.py` with its changed `modeling_gemma.py`. Norms
multiply by 1 + weight; those of pi0.5's expert take scale, shift and the gate of their residual
from the time. Parameters have transformers' names. What modules take is made of tensors and tuples,
so that partial passes see whether it has changed.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from qvla_export.policies.pi.architecture import GemmaSize

# Added to scores of positions that are not attended to; exp of it is 0, and float16 holds it.
HIDDEN_SCORE = -30000.0
_EPSILON = 1e-6
_ROPE_BASE = 10000.0


class KeysValues(NamedTuple):
    """Keys and values of one block, rotated.  [B, key-value heads, N, head dim]"""

    keys: Tensor
    values: Tensor


class Places(NamedTuple):
    """Where positions stand, and what they may see."""

    # Cosines and sines of the rotation.  [B, 1, N, head dim]
    cosines: Tensor
    sines: Tensor
    # Added to scores, [B or 1, 1, N, N with those before]; None where everything is seen.
    scores: Tensor | None


class GemmaNorm(nn.Module):
    """Root mean square norm, times 1 + weight."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, hidden: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the normed states, and no gate."""
        return _normed(hidden) * (1 + self.weight), None


class AdaptiveNorm(nn.Module):
    """Root mean square norm whose scale, shift and gate are linear in what stands for the time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, 3 * width)

    def forward(self, hidden: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the normed states and the gate of what is computed from them.

        Args:
            hidden: [B, N, width]
            time: [B, width]
        """
        assert time is not None
        scale, shift, gate = self.dense(time)[:, None].chunk(3, dim=-1)
        return _normed(hidden) * (1 + scale) + shift, gate


def _normed(hidden: Tensor) -> Tensor:
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + _EPSILON)


class KeyValueRows(nn.Module):
    """The keys and values of a block, rotated."""

    def __init__(self, size: GemmaSize) -> None:
        super().__init__()
        self.size = size
        rows = size.kv_heads * size.head_dim
        self.k_proj = nn.Linear(size.width, rows, bias=False)
        self.v_proj = nn.Linear(size.width, rows, bias=False)

    def keys_values(self, hidden: Tensor, places: Places) -> KeysValues:
        """Return those of positions [B, N, width]."""
        keys = self._heads(self.k_proj(hidden), self.size.kv_heads)
        values = self._heads(self.v_proj(hidden), self.size.kv_heads)
        return KeysValues(_rotated(keys, places), values)

    def _heads(self, projected: Tensor, heads: int) -> Tensor:
        batch, rows, _ = projected.shape
        return projected.reshape(batch, rows, heads, self.size.head_dim).transpose(1, 2)


class GemmaAttention(KeyValueRows):
    """Attention with fewer keys than queries, also to keys and values that came before."""

    def __init__(self, size: GemmaSize) -> None:
        super().__init__(size)
        rows = size.heads * size.head_dim
        self.q_proj = nn.Linear(size.width, rows, bias=False)
        self.o_proj = nn.Linear(rows, size.width, bias=False)

    def forward(self, hidden: Tensor, here: KeysValues, places: Places) -> Tensor:
        """Return what each position takes from those it sees.

        Args:
            hidden: [B, N, width]
            here: keys and values of all that may be seen, the positions themselves last.
            places: of the positions.
        """
        batch, rows, _ = hidden.shape
        size = self.size
        queries = _rotated(self._heads(self.q_proj(hidden), size.heads), places)
        # Queries that share keys and values stand below each other: nothing is repeated.
        group = (batch, size.kv_heads, size.heads // size.kv_heads * rows, size.head_dim)
        scores = queries.reshape(group) @ here.keys.transpose(2, 3) * size.head_dim**-0.5
        scores = scores.reshape(batch, size.heads, rows, -1)
        if places.scores is not None:
            scores = scores + places.scores
        weights = scores.softmax(dim=-1).reshape(*group[:3], -1)
        mixed = (weights @ here.values).reshape(batch, size.heads, rows, size.head_dim)
        output: Tensor = self.o_proj(mixed.transpose(1, 2).reshape(batch, rows, -1))
        return output


class GemmaMlp(nn.Module):
    """Gated MLP with GELU by tanh."""

    def __init__(self, size: GemmaSize) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size.width, size.mlp, bias=False)
        self.up_proj = nn.Linear(size.width, size.mlp, bias=False)
        self.down_proj = nn.Linear(size.mlp, size.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [B, N, width]."""
        gate = nn.functional.gelu(self.gate_proj(hidden), approximate="tanh")
        mapped: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return mapped


class GemmaBlock(nn.Module):
    """Attention and MLP, each behind a norm and added to what it reads."""

    def __init__(self, size: GemmaSize, adaptive: bool = False) -> None:
        super().__init__()
        norm = AdaptiveNorm if adaptive else GemmaNorm
        self.self_attn = GemmaAttention(size)
        self.mlp = GemmaMlp(size)
        self.input_layernorm = norm(size.width)
        self.post_attention_layernorm = norm(size.width)

    def forward(
        self,
        hidden: Tensor,
        places: Places,
        past: KeysValues | None = None,
        time: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:
        """Return the next block's hidden states, and keys and values of these.

        Args:
            hidden: [B, N, width]
            places: of the positions.
            past: of positions before them; None for none.
            time: what stands for it, for adaptive norms.  [B, width]
        """
        normed, gate = self.input_layernorm(hidden, time)
        here = self.self_attn.keys_values(normed, places)
        mixed = self.self_attn(normed, here if past is None else _joined(past, here), places)
        hidden = _added(hidden, mixed, gate)
        normed, gate = self.post_attention_layernorm(hidden, time)
        return _added(hidden, self.mlp(normed), gate), here


class LastPrefixBlock(nn.Module):
    """The language model's last block: its keys and values are read, its states by nobody."""

    def __init__(self, size: GemmaSize) -> None:
        super().__init__()
        self.self_attn = KeyValueRows(size)
        self.input_layernorm = GemmaNorm(size.width)

    def forward(self, hidden: Tensor, places: Places) -> KeysValues:
        """Return keys and values of hidden states [B, N, width]."""
        normed, _ = self.input_layernorm(hidden, None)
        return self.self_attn.keys_values(normed, places)


def _joined(past: KeysValues, here: KeysValues) -> KeysValues:
    return KeysValues(
        torch.cat([past.keys, here.keys], dim=2), torch.cat([past.values, here.values], dim=2)
    )


def _added(hidden: Tensor, change: Tensor, gate: Tensor | None) -> Tensor:
    return hidden + (change if gate is None else change * gate)


def _rotated(heads: Tensor, places: Places) -> Tensor:
    """Rotate halves against each other (RoPE).  [B, heads, N, head dim]"""
    first, second = heads.chunk(2, dim=-1)
    return heads * places.cosines + torch.cat([-second, first], dim=-1) * places.sines


def rotation(positions: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """Return cosines and sines of positions.

    Args:
        positions: int64 [B, N]
        head_dim: numbers of a head.

    Returns:
        float32 [B, 1, N, head dim] each.
    """
    steps = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32)
    frequencies = 1.0 / _ROPE_BASE ** (steps / head_dim)
    angles = positions[:, None, :, None].to(torch.float32) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def hidden_scores(seen: Tensor) -> Tensor:
    """Return what hides positions when it is added to scores: 0 where `seen`."""
    return (~seen).to(torch.float32) * HIDDEN_SCORE
