"""Attention of ACT's transformer, its projections apart so that each can be quantized."""

import torch
from torch import Tensor, nn


class SelfAttention(nn.Module):
    """Attends within a sequence: queries and keys know positions, values do not."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        # Queries and keys are maps of one input, so they are one layer.
        self.qk_proj = nn.Linear(width, 2 * width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, values: Tensor, positions: Tensor) -> Tensor:
        """Return [B, N, width] of a sequence of the same shape and its position codes."""
        query, key = self.qk_proj(values + positions).chunk(2, dim=-1)
        attended: Tensor = self.out_proj(_attend(query, key, self.v_proj(values), self._heads))
        return attended

    def of_nothing(self, batch: int) -> Tensor:
        """Return what sequences of zeros become, whatever their positions: [batch, 1, width].

        All values are equal, so weights of queries, keys and values cannot change the result.
        """
        found: Tensor = self.out_proj(self.v_proj.bias.expand(batch, 1, -1))
        return found


class CrossAttention(nn.Module):
    """Attends from one sequence to another."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return [B, N, width] of queries [B, N, width], keys and values [B, M, width]."""
        parts = self.query(query), self.key(key), self.value(value)
        attended: Tensor = self.out_proj(_attend(*parts, self._heads))
        return attended


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    def split(rows: Tensor) -> Tensor:
        return rows.reshape(*rows.shape[:2], heads, -1).transpose(1, 2)

    attended = nn.functional.scaled_dot_product_attention(split(query), split(key), split(value))
    return attended.transpose(1, 2).reshape(query.shape)


def camera_positions(height: int, width: int, channels: int) -> Tensor:
    """Return the sine codes of a feature map's places, row by row.  [height * width, channels]

    Source: lerobot 0.6.1 `ACTSinusoidalPositionEmbedding2d`: the first half of the channels tells
    the row, the second the column.
    """
    half = channels // 2
    index = torch.arange(half)
    frequency = 10000 ** (2 * torch.div(index, 2, rounding_mode="floor") / half)

    def code(length: int) -> Tensor:
        place = torch.arange(1, length + 1) / (length + 1e-6) * 2 * torch.pi
        angle = place[:, None] / frequency
        return torch.where(index % 2 == 0, angle.sin(), angle.cos())

    rows = code(height)[:, None].expand(height, width, half)
    columns = code(width)[None].expand(height, width, half)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)
