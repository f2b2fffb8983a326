"""What blocks are made of where a second stack reads the first one's keys and values.

Sources: openpi `models_pytorch/gemma_pytorch.py`; lerobot 0.6.1
`policies/smolvla/smolvlm_with_expert.py`. Rotations have base 10,000 in both, whatever a VLM's
config.json says. Parameters have transformers' names. What modules take is made of tensors and
tuples, so that partial passes see whether it has changed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qvla_export.policies.flow.architecture import StackSize

_ROPE_BASE = 10000.0


class KeysValues(NamedTuple):
    """Keys and values of one block, keys rotated.  [B, key-value heads, N, head dim]"""

    keys: Tensor
    values: Tensor


class Places(NamedTuple):
    """Where positions stand, and what they may see."""

    # Cosines and sines of the rotation.  [B, 1, N, head dim]
    cosines: Tensor
    sines: Tensor
    # Added to scores, [B or 1, 1, N, all that may be seen]; None where everything is.
    scores: Tensor | None


class GroupedHeads(nn.Module):
    """What attention with fewer keys than queries shares with its keys: rows cut into heads."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self.size = size

    def split(self, rows: Tensor) -> Tensor:
        """Return [B, heads, N, head dim] of [B, N, heads * head dim]."""
        batch, places, width = rows.shape
        head_dim = self.size.head_dim
        return rows.reshape(batch, places, width // head_dim, head_dim).transpose(1, 2)

    def attend(self, queries: Tensor, seen: KeysValues, scores: Tensor | None) -> Tensor:
        """Return what queries [B, heads, N, head dim] take from what they see, [B, N, rows]."""
        size, batch, rows = self.size, queries.shape[0], queries.shape[2]
        # Queries that share keys and values stand below each other: nothing is repeated.
        group = (batch, size.kv_heads, size.heads // size.kv_heads * rows, size.head_dim)
        likeness = queries.reshape(group) @ seen.keys.transpose(2, 3) * size.head_dim**-0.5
        likeness = likeness.reshape(batch, size.heads, rows, -1)
        if scores is not None:
            likeness = likeness + scores
        weights = likeness.softmax(dim=-1).reshape(*group[:3], -1)
        mixed: Tensor = (weights @ seen.values).reshape(batch, size.heads, rows, size.head_dim)
        return mixed.transpose(1, 2).reshape(batch, rows, -1)


class KeyValueRows(GroupedHeads):
    """The keys and values of a block."""

    def __init__(self, size: StackSize) -> None:
        super().__init__(size)
        rows = size.kv_heads * size.head_dim
        self.k_proj = nn.Linear(size.width, rows, bias=False)
        self.v_proj = nn.Linear(size.width, rows, bias=False)

    def keys_values(self, hidden: Tensor, places: Places) -> KeysValues:
        """Return those of positions [B, N, width]."""
        keys = rotated(self.split(self.k_proj(hidden)), places)
        return KeysValues(keys, self.split(self.v_proj(hidden)))


class GroupedAttention(KeyValueRows):
    """Attention among positions, and to what came before them."""

    def __init__(self, size: StackSize) -> None:
        super().__init__(size)
        rows = size.heads * size.head_dim
        self.q_proj = nn.Linear(size.width, rows, bias=False)
        self.o_proj = nn.Linear(rows, size.width, bias=False)

    def forward(self, hidden: Tensor, seen: KeysValues, places: Places) -> Tensor:
        """Return what each position takes from those it sees.

        Args:
            hidden: [B, N, width]
            seen: keys and values of all that may be seen, the positions themselves last.
            places: of the positions.
        """
        queries = rotated(self.split(self.q_proj(hidden)), places)
        mixed: Tensor = self.o_proj(self.attend(queries, seen, places.scores))
        return mixed


class GatedMlp(nn.Module):
    """Gated MLP."""

    def __init__(self, size: StackSize, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._activation = activation
        self.gate_proj = nn.Linear(size.width, size.mlp, bias=False)
        self.up_proj = nn.Linear(size.width, size.mlp, bias=False)
        self.down_proj = nn.Linear(size.mlp, size.width, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map hidden states [B, N, width]."""
        gate = self._activation(self.gate_proj(hidden))
        mapped: Tensor = self.down_proj(gate * self.up_proj(hidden))
        return mapped


def joined(past: KeysValues, here: KeysValues) -> KeysValues:
    """Return keys and values of positions behind others."""
    return KeysValues(
        torch.cat([past.keys, here.keys], dim=2), torch.cat([past.values, here.values], dim=2)
    )


def normed_states(hidden: Tensor, eps: float) -> Tensor:
    """Return states divided by their root mean square."""
    return hidden * torch.rsqrt(hidden.square().mean(dim=-1, keepdim=True) + eps)


def rotated(heads: Tensor, places: Places) -> Tensor:
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
