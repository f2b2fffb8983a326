"""The network of SmolVLA: a prefix that is read once, and the velocity of a flow.

Source: lerobot 0.6.1 `policies/smolvla/modeling_smolvla.py`, `VLAFlowMatching.sample_actions`. What
upstream computes and never reads (the last language block beyond its keys and values, the output
layer) is not here; the keys and values that the expert makes of the prefix are made with it, once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel

from qvla_export.policies.smolvla.architecture import SmolVlaArchitecture, StackSize
from qvla_export.policies.smolvla.blocks import (
    Block,
    RootMeanNorm,
    SmolCrossAttention,
    SmolKeysValues,
    SmolLastPrefixBlock,
    SmolPlaces,
    hidden_scores,
    rotation,
)


@dataclass(frozen=True)
class SmolPrefixInputs:
    """Images, words and state of several observations."""

    # [-1, 1], images one after the other.  float32 [B, 3 * images, S, S]
    pixel_values: Tensor
    # Rows padded at the end.  int64 [B, L]
    input_ids: Tensor
    # float32 [B, n]
    state: Tensor
    # Which images are there; None for all.  bool [B, images]
    image_mask: Tensor | None = None
    # int64 [B]; None if every row has L tokens.
    prompt_lengths: Tensor | None = None


@dataclass(frozen=True)
class SmolPrefix:
    """What every step of a flow reads, computed once a chunk."""

    # Of each block: the language model's, or what a crossing block of the expert makes of them.
    pairs: Sequence[SmolKeysValues]
    # Positions that count: those of masked images and of padding do not.  int64 [B]
    length: Tensor
    # Added to scores of the prefix's positions; None where all are seen.  [B, N]
    scores: Tensor | None


class SmolPrefixModel(nn.Module):
    """SmolVLM2's language model, up to its last block's keys and values."""

    def __init__(self, size: StackSize, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, size.width)
        blocks: list[nn.Module] = [Block(size) for _ in range(size.depth - 1)]
        self.layers = nn.ModuleList([*blocks, SmolLastPrefixBlock(size)])


class SmolExpertModel(nn.Module):
    """The action expert's blocks and their final norm."""

    def __init__(self, arch: SmolVlaArchitecture) -> None:
        super().__init__()
        size = arch.expert
        self.layers = nn.ModuleList(
            Block(size, crosses=not arch.attends_itself(i)) for i in range(size.depth)
        )
        self.norm = RootMeanNorm(size.width, size.eps)


class SmolVlaModule(nn.Module):
    """Images, words, state and noise to a chunk of actions."""

    # What stands for the time in each step.  float32 [steps, width of the expert]
    time_table: Tensor

    def __init__(self, arch: SmolVlaArchitecture) -> None:
        super().__init__()
        self.arch = arch
        width, inner = arch.expert.width, arch.language.width
        self.vision_tower = SiglipVisionModel(arch.siglip)
        gathered = int(arch.siglip.hidden_size) * arch.scale_factor**2
        self.connector = nn.Linear(gathered, inner, bias=False)
        self.language_model = SmolPrefixModel(arch.language, arch.vocab_size)
        self.action_expert = SmolExpertModel(arch)
        self.state_proj = nn.Linear(arch.state_width, inner)
        self.action_in_proj = nn.Linear(arch.action_width, width)
        self.action_out_proj = nn.Linear(width, arch.action_width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        table = torch.from_numpy(arch.flow.time_table(width))
        self.register_buffer(
            "time_table", table.to(self.action_in_proj.weight.device), persistent=False
        )

    def forward(self, inputs: SmolPrefixInputs, noise: Tensor) -> Tensor:
        """Return the flow's end for noise [B, horizon, width]; differentiable in all steps."""
        prefix, flow = self.prefix(inputs), noise
        for number in range(self.arch.flow.steps):
            index = torch.full((1,), number, dtype=torch.int64, device=noise.device)
            flow = self.step(prefix, flow, index)
        return flow

    def step(self, prefix: SmolPrefix, flow: Tensor, index: Tensor) -> Tensor:
        """Return the flow [B, horizon, width] after the Euler step of an index, int64 [1]."""
        return flow + self.arch.flow.step * self.velocity(prefix, flow, index)

    def prefix(self, inputs: SmolPrefixInputs) -> SmolPrefix:
        """Read images, words and state."""
        hidden, seen = self.embed(inputs)
        rows = hidden.shape[1]
        if seen is None:
            # Of what the tracer knows to vary, not of a number; and of floats, which hold counts
            # exactly: TensorRT adds up no whole numbers.
            length = torch.ones_like(hidden[:, :, 0]).sum(dim=1).to(torch.int64)
            positions, scores = torch.arange(rows, device=hidden.device)[None], None
        else:
            count = seen.to(torch.float32).cumsum(dim=1).to(torch.int64)
            length, positions = count[:, -1], count - 1
            scores = hidden_scores(seen)
        # Images and words do not see the state, which stands last and sees all.
        order = torch.arange(rows, device=hidden.device)
        added = hidden_scores((order[:, None] == rows - 1) | (order[None] < rows - 1))[None, None]
        if scores is not None:
            added = added + scores[:, None, None]
        places = SmolPlaces(*rotation(positions, self.arch.language.head_dim), added)
        pairs = []
        for block in self.language_model.layers[:-1]:
            hidden, here = block(hidden, places)
            pairs.append(here)
        pairs.append(self.language_model.layers[-1](hidden, places))
        return SmolPrefix([self._read(i, pair) for i, pair in enumerate(pairs)], length, scores)

    def _read(self, block: int, kept: SmolKeysValues) -> SmolKeysValues:
        attention = self.action_expert.layers[block].get_submodule("self_attn")
        return attention.keys_values(kept) if isinstance(attention, SmolCrossAttention) else kept

    def embed(self, inputs: SmolPrefixInputs) -> tuple[Tensor, Tensor | None]:
        """Return embeddings of images, words, state [B, N, width], and which count; None: all."""
        scale = self.arch.language.width**0.5
        images = self.images(inputs.pixel_values) * scale
        text = self.language_model.embed_tokens(inputs.input_ids) * scale
        state = self.state_proj(inputs.state)[:, None]
        hidden = torch.cat([images, text, state], dim=1)
        mask, lengths = inputs.image_mask, inputs.prompt_lengths
        if mask is None and lengths is None:
            return hidden, None
        of_images, of_text, last = (
            torch.ones_like(part[:, :, 0], dtype=torch.bool) for part in (images, text, state)
        )
        if mask is not None:
            of_images = mask.repeat_interleave(self.arch.image_tokens, dim=1)
        if lengths is not None:
            columns = torch.arange(text.shape[1], device=text.device)
            of_text = columns[None] < lengths[:, None]
        return hidden, torch.cat([of_images, of_text, last], dim=1)

    def images(self, pixel_values: Tensor) -> Tensor:
        """Return embeddings [B, images * tokens, width] of pixels [B, 3 * images, S, S]."""
        batch, channels, height, width = pixel_values.shape
        frames = pixel_values.reshape(batch * (channels // 3), 3, height, width)
        features = self.features(frames)
        side, scale = round(features.shape[1] ** 0.5), self.arch.scale_factor
        # A token gathers a block of patches, row by row.
        grid = features.reshape(-1, side // scale, scale, side // scale, scale, features.shape[2])
        gathered = grid.transpose(2, 3).reshape(frames.shape[0], self.arch.image_tokens, -1)
        embedded: Tensor = self.connector(gathered)
        return embedded.reshape(batch, -1, embedded.shape[-1])

    def features(self, frames: Tensor) -> Tensor:
        """Return SigLIP's patch features [N, patches, width] of frames [N, 3, S, S]."""
        tower = self.vision_tower
        hidden: Tensor = tower.embeddings.patch_embedding(frames).flatten(2).transpose(1, 2)
        hidden = hidden + tower.embeddings.position_embedding.weight
        for block in tower.encoder.layers:
            hidden = block(hidden, attention_mask=None)
        normed: Tensor = tower.post_layernorm(hidden)
        return normed

    def velocity(self, prefix: SmolPrefix, flow: Tensor, index: Tensor) -> Tensor:
        """Return the flow's velocity [B, horizon, width] in a step; see `step`."""
        hidden, expert = self.suffix(flow, index), self.action_expert
        among, across = self._places(prefix, hidden.shape[1])
        for number, (block, past) in enumerate(zip(expert.layers, prefix.pairs, strict=True)):
            places = among if self.arch.attends_itself(number) else across
            hidden, _ = block(hidden, places, past)
        velocity: Tensor = self.action_out_proj(expert.norm(hidden))
        return velocity

    def suffix(self, flow: Tensor, index: Tensor) -> Tensor:
        """Return what the expert reads [B, horizon, width]: actions and the time beside them."""
        actions = self.action_in_proj(flow)
        # A row for each observation: modules map batches to batches.
        time = self.time_table[index].expand(flow.shape[0], -1)[:, None].expand_as(actions)
        both = nn.functional.silu(self.action_time_mlp_in(torch.cat([actions, time], dim=2)))
        mapped: Tensor = self.action_time_mlp_out(both)
        return mapped

    def _places(self, prefix: SmolPrefix, rows: int) -> tuple[SmolPlaces, SmolPlaces]:
        """Where actions stand: behind the prefix among themselves, from 0 where they cross."""
        order, size = torch.arange(rows, device=prefix.length.device), self.arch.expert
        before = prefix.scores
        if before is None:
            before = torch.zeros_like(prefix.pairs[0].keys[:, 0, :, 0])
        above = before[:, None].expand(-1, rows, -1)
        # Each action sees those before it.
        later = hidden_scores(order[:, None] >= order[None])[None].expand(above.shape[0], -1, -1)
        behind = rotation(prefix.length[:, None] + order[None], size.head_dim)
        among = SmolPlaces(*behind, torch.cat([above, later], dim=2)[:, None])
        scores = None if prefix.scores is None else above[:, None]
        return among, SmolPlaces(*rotation(order[None], size.head_dim), scores)
