"""A Llama decoder that attends to what came before, with a cache that rolls, for token policies.

One graph serves the whole prompt and every token after it: the newest positions stand last, and
each pass drops as many from the front as it appends, so that shapes do not depend on how many
tokens there are yet.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from qvla_export.policies.hidden_scores import HIDDEN_SCORE


@dataclass(frozen=True)
class LayerCache:
    """Keys and values of one block, rotated; the newest positions last."""

    # [B, key-value heads, room, head dim]
    keys: Tensor
    values: Tensor


class CachedDecoder(nn.Module):
    """Llama body and the rows of its output layer that a policy reads."""

    def __init__(self, llama: LlamaConfig, head_rows: int) -> None:
        super().__init__()
        self.model = LlamaModel(llama)
        self.lm_head = nn.Linear(llama.hidden_size, head_rows, bias=False)

    def forward(self, hidden: Tensor, length: Tensor) -> Tensor:
        """Run all blocks and the final norm on whole sequences, without a cache.

        Args:
            hidden: sequences that end together.  [B, N, hidden]
            length: positions of each, those before are padding.  int64 [B]
        """
        hidden, _ = self.blocks(hidden, length, None, 0, len(self.model.layers))
        normed: Tensor = self.model.norm(hidden)
        return normed

    def blocks(
        self,
        hidden: Tensor,
        length: Tensor,
        past: Sequence[LayerCache] | None,
        first: int,
        last: int,
    ) -> tuple[Tensor, list[LayerCache]]:
        """Run the blocks [first, last) on the newest positions.

        Args:
            hidden: [B, rows, hidden]
            length: positions so far, these included; a row's padding is what lies before.  [B]
            past: cache of each of the blocks, with room for all positions; None where `hidden` is
                all there is.
            first, last: which blocks.

        Returns:
            Hidden states [B, rows, hidden], and the caches with these rows in, where there were
            any.
        """
        rows = hidden.shape[1]
        room = rows if past is None else past[0].keys.shape[2]
        query = torch.arange(rows, device=hidden.device)
        # Below 0 in padding, which nothing attends to.
        positions = length[:, None] - rows + query
        rotary = self.model.rotary_emb(hidden, position_ids=positions)
        mask = _mask(query, length, room).to(hidden.dtype)
        caches = []
        for index in range(first, last):
            block, roll = self.model.layers[index], None
            if past is not None:
                roll = _Roll(past[index - first])
            hidden = block(
                hidden, attention_mask=mask, past_key_values=roll, position_embeddings=rotary
            )
            if roll is not None:
                caches.append(roll.cache)
        return hidden, caches

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the output layer's rows of the final norm [B, N, rows] of blocks' output."""
        logits: Tensor = self.lm_head(self.model.norm(hidden))
        return logits

    def empty_cache(self, hidden: Tensor, room: int) -> LayerCache:
        """Return a block's cache of nothing, with room for some positions.

        Args:
            hidden: [B, N, hidden]; the cache is of its batch, type and device.
            room: positions.
        """
        llama = self.model.config
        heads = int(llama.num_key_value_heads or llama.num_attention_heads)
        size = int(llama.head_dim or llama.hidden_size // llama.num_attention_heads)
        shape = (hidden.shape[0], heads, room, size)
        zeros = torch.zeros(shape, dtype=hidden.dtype, device=hidden.device)
        return LayerCache(zeros, zeros)


def _mask(query: Tensor, length: Tensor, room: int) -> Tensor:
    """Scores to add [B, 1, rows, room]: a row sees the positions up to its own, no padding."""
    rows = query.shape[0]
    key = torch.arange(room, device=query.device)
    later = key[None, :] > query[:, None] + (room - rows)
    padding = key[None, :] < room - length[:, None]
    unseen = later[None] | padding[:, None, :]
    return (unseen.to(torch.float32) * HIDDEN_SCORE)[:, None]


class _Roll:
    """What transformers' attention asks for a cache: appends rows, drops as many of the oldest."""

    def __init__(self, past: LayerCache) -> None:
        self.cache = past

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Return keys and values of all positions that there is room for."""
        rows, past = keys.shape[2], self.cache
        self.cache = LayerCache(
            torch.cat([past.keys, keys], dim=2)[:, :, rows:],
            torch.cat([past.values, values], dim=2)[:, :, rows:],
        )
        return self.cache.keys, self.cache.values
