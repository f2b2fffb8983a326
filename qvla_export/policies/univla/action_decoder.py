"""What makes a chunk of actions of latent tokens' states and of the image's.

Source: UniVLA `prismatic/models/policy/transformer_utils.py` (`MAPBlock`) and
`experiments/robot/libero/run_libero_eval.py` (`ActionDecoderHead`). Parameter names are theirs.
"""

import torch
from torch import Tensor, nn

from qvla_export.policies.univla.architecture import DecoderShape

_NORM_FLOOR = 1e-8


class RmsNorm(nn.Module):
    """x over its root mean square, times a learned scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(width))

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalize [..., width]."""
        size = hidden.norm(dim=-1, keepdim=True) * self.g.shape[0] ** -0.5
        normed: Tensor = hidden / size.clamp(min=_NORM_FLOOR) * self.g
        return normed


class SwishGlu(nn.Module):
    """Gated map: half the outputs times SiLU of the other half."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 2 * inner)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., width] to [..., inner]."""
        value, gate = self.project(hidden).chunk(2, dim=-1)
        gated: Tensor = value * nn.functional.silu(gate)
        return gated


class PoolingAttention(nn.Module):
    """One learned query attends to a sequence."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, query: Tensor, sequence: Tensor) -> Tensor:
        """Pool a sequence [B, N, width] into [B, 1, width]."""
        batch, count, width = sequence.shape
        size = width // self.heads
        q = self.q(query).reshape(batch, 1, self.heads, size).transpose(1, 2)
        kv = self.kv(sequence).reshape(batch, count, 2, self.heads, size).permute(2, 0, 3, 1, 4)
        scores = q @ (kv[0].transpose(-2, -1) * size**-0.5)
        values = (scores.softmax(dim=-1) @ kv[1]).transpose(1, 2).reshape(batch, 1, width)
        pooled: Tensor = self.proj(values)
        return pooled


class PoolingBlock(nn.Module):
    """Pool a sequence into one vector; norms come after (UniVLA's `MAPBlock` of one latent)."""

    def __init__(self, inputs: int, shape: DecoderShape) -> None:
        super().__init__()
        width = shape.width
        self.projection = nn.Linear(inputs, width)
        self.latents = nn.Parameter(0.02 * torch.randn(1, width))
        self.attn_norm = RmsNorm(width)
        self.attn = PoolingAttention(width, shape.heads)
        self.mlp_norm = RmsNorm(width)
        self.mlp = nn.Sequential(SwishGlu(width, shape.mlp), nn.Linear(shape.mlp, width))

    def forward(self, sequence: Tensor, start: Tensor | None = None) -> Tensor:
        """Pool [B, N, inputs] into [B, width]; `start` [B, width] is added to the query."""
        query = self.latents[None].expand(sequence.shape[0], -1, -1)
        if start is not None:
            query = query + start[:, None]
        hidden = self.attn_norm(query + self.attn(query, self.projection(sequence)))
        pooled: Tensor = self.mlp_norm(hidden + self.mlp(hidden))
        return pooled[:, 0]


class ActionDecoder(nn.Module):
    """States of patches and of latent tokens -> a chunk of normalized actions."""

    def __init__(self, inputs: int, shape: DecoderShape, horizon: int, action_dim: int) -> None:
        super().__init__()
        self.size = horizon, action_dim
        self.latent_action_pool = PoolingBlock(inputs, shape)
        self.visual_pool = PoolingBlock(inputs, shape)
        self.proj = nn.Sequential(nn.Linear(shape.width, horizon * action_dim), nn.Tanh())

    def forward(self, latents: Tensor, visual: Tensor) -> Tensor:
        """Return actions [B, horizon, dim].

        Args:
            latents: states that predict the latent tokens.  [B, latent tokens, D]
            visual: what `visual_pool` made of the patches.  [B, width]
        """
        actions: Tensor = self.proj(self.latent_action_pool(latents, visual))
        return actions.reshape(-1, *self.size)
