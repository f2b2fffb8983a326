"""Gemma blocks of which two stacks share attention: the second reads the first one's keys.

Source: openpi `models_pytorch/gemma_pytorch.py` with its changed `modeling_gemma.py`. Norms
multiply by 1 + weight; those of pi0.5's expert take scale, shift and the gate of their residual
from the time.
"""

from functools import partial

import torch
from torch import Tensor, nn

from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.attention import (
    GatedMlp,
    GroupedAttention,
    KeysValues,
    KeyValueRows,
    Places,
    joined,
    normed_states,
)

_GELU = partial(nn.functional.gelu, approximate="tanh")


class GemmaNorm(nn.Module):
    """Root mean square norm, times 1 + weight."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self._eps = size.eps
        self.weight = nn.Parameter(torch.zeros(size.width))

    def forward(self, hidden: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the normed states, and no gate."""
        return normed_states(hidden, self._eps) * (1 + self.weight), None


class AdaptiveNorm(nn.Module):
    """Root mean square norm whose scale, shift and gate are linear in what stands for the time."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self._eps = size.eps
        self.dense = nn.Linear(size.width, 3 * size.width)

    def forward(self, hidden: Tensor, time: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the normed states and the gate of what is computed from them.

        Args:
            hidden: [B, N, width]
            time: [B, width]
        """
        assert time is not None
        scale, shift, gate = self.dense(time)[:, None].chunk(3, dim=-1)
        return normed_states(hidden, self._eps) * (1 + scale) + shift, gate


class GemmaBlock(nn.Module):
    """Attention and MLP, each behind a norm and added to what it reads."""

    def __init__(self, size: StackSize, adaptive: bool = False) -> None:
        super().__init__()
        norm = AdaptiveNorm if adaptive else GemmaNorm
        self.self_attn = GroupedAttention(size)
        self.mlp = GatedMlp(size, _GELU)
        self.input_layernorm = norm(size)
        self.post_attention_layernorm = norm(size)

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
        mixed = self.self_attn(normed, here if past is None else joined(past, here), places)
        hidden = _added(hidden, mixed, gate)
        normed, gate = self.post_attention_layernorm(hidden, time)
        return _added(hidden, self.mlp(normed), gate), here


class LastGemmaBlock(nn.Module):
    """The language model's last block: its keys and values are read, its states by nobody."""

    def __init__(self, size: StackSize) -> None:
        super().__init__()
        self.self_attn = KeyValueRows(size)
        self.input_layernorm = GemmaNorm(size)

    def forward(self, hidden: Tensor, places: Places) -> KeysValues:
        """Return keys and values of hidden states [B, N, width]."""
        normed, _ = self.input_layernorm(hidden, None)
        return self.self_attn.keys_values(normed, places)


def _added(hidden: Tensor, change: Tensor, gate: Tensor | None) -> Tensor:
    return hidden + (change if gate is None else change * gate)
