"""The network of pi0 and pi0.5: a prefix that is read once, and the velocity of a flow.

Source: openpi `models_pytorch/pi0_pytorch.py`, `PI0Pytorch.sample_actions`. What upstream computes
and never reads (the last language block beyond its keys and values, output layers) is not here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel

from qvla_export.policies.pi.architecture import GemmaSize, PiArchitecture
from qvla_export.policies.pi.gemma import (
    AdaptiveNorm,
    GemmaBlock,
    GemmaNorm,
    KeysValues,
    LastPrefixBlock,
    Places,
    hidden_scores,
    rotation,
)


@dataclass(frozen=True)
class PrefixInputs:
    """Images, prompt and state of several observations."""

    # [-1, 1], images one after the other.  float32 [B, 3 * images, S, S]
    pixel_values: Tensor
    # Rows padded at the end.  int64 [B, L]
    input_ids: Tensor
    # float32 [B, n]; None where the state is in the prompt.
    state: Tensor | None = None
    # Which images are there; None for all.  bool [B, images]
    image_mask: Tensor | None = None
    # int64 [B]; None if every row has L tokens.
    prompt_lengths: Tensor | None = None


@dataclass(frozen=True)
class Prefix:
    """What every step of a flow reads, computed once a chunk."""

    # Of each block of the language model.
    pairs: Sequence[KeysValues]
    # Positions that count: those of masked images and of padding do not.  int64 [B]
    length: Tensor
    # The state as a token; None where the state is in the prompt.  [B, 1, width of the expert]
    state_token: Tensor | None
    # Added to scores of the prefix's positions; None where all are seen.  [B, N]
    scores: Tensor | None


class PrefixModel(nn.Module):
    """PaliGemma's language model, up to its last block's keys and values."""

    def __init__(self, size: GemmaSize, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, size.width)
        blocks: list[nn.Module] = [GemmaBlock(size) for _ in range(size.depth - 1)]
        self.layers = nn.ModuleList([*blocks, LastPrefixBlock(size)])


class ExpertModel(nn.Module):
    """The action expert's blocks and their final norm."""

    def __init__(self, size: GemmaSize, adaptive: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GemmaBlock(size, adaptive) for _ in range(size.depth))
        self.norm = (AdaptiveNorm if adaptive else GemmaNorm)(size.width)


class PiModule(nn.Module):
    """Images, prompt, state and noise to a chunk of actions."""

    # What stands for the time in each step.  float32 [steps, width of the expert]
    time_table: Tensor

    def __init__(self, arch: PiArchitecture) -> None:
        super().__init__()
        self.arch = arch
        width = arch.expert.width
        self.vision_tower = SiglipVisionModel(arch.siglip)
        self.multi_modal_projector = nn.Linear(arch.siglip.hidden_size, arch.language.width)
        self.language_model = PrefixModel(arch.language, arch.vocab_size)
        self.action_expert = ExpertModel(arch.expert, arch.adaptive)
        self.action_in_proj = nn.Linear(arch.action_width, width)
        self.action_out_proj = nn.Linear(width, arch.action_width)
        if arch.adaptive:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(arch.state_width, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        table = torch.from_numpy(arch.flow.time_table(width))
        # On device "meta" where the weights are.
        table = table.to(self.action_in_proj.weight.device)
        self.register_buffer("time_table", table, persistent=False)

    def forward(self, inputs: PrefixInputs, noise: Tensor) -> Tensor:
        """Return the flow's end for noise [B, horizon, width]; differentiable in all steps."""
        prefix, flow = self.prefix(inputs), noise
        for number in range(self.arch.flow.steps):
            index = torch.full((1,), number, dtype=torch.int64, device=noise.device)
            flow = self.step(prefix, flow, index)
        return flow

    def step(self, prefix: Prefix, flow: Tensor, index: Tensor) -> Tensor:
        """Return the flow after one Euler step.

        Args:
            prefix: from `prefix`.
            flow: where it stands.  float32 [B, horizon, width]
            index: of the step, from 0.  int64 [1]
        """
        return flow + self.arch.flow.step * self.velocity(prefix, flow, index)

    def prefix(self, inputs: PrefixInputs) -> Prefix:
        """Read images, prompt and state."""
        hidden, seen = self.embed(inputs)
        rows = hidden.shape[1]
        if seen is None:
            # Of what the tracer knows to vary, not of a number.
            length = torch.ones_like(hidden[:, :, 0], dtype=torch.int64).sum(dim=1)
            positions, scores = torch.arange(rows, device=hidden.device)[None], None
        else:
            # Of floats, which hold them exactly: TensorRT adds up no whole numbers.
            count = seen.to(torch.float32).cumsum(dim=1).to(torch.int64)
            length, positions = count[:, -1], count - 1
            scores = hidden_scores(seen)
        added = None if scores is None else scores[:, None, None]
        places = Places(*rotation(positions, self.arch.language.head_dim), added)
        pairs = []
        for block in self.language_model.layers[:-1]:
            hidden, here = block(hidden, places)
            pairs.append(here)
        pairs.append(self.language_model.layers[-1](hidden, places))
        token = None if self.arch.adaptive else self.state_proj(inputs.state)[:, None]
        return Prefix(pairs, length, token, scores)

    def embed(self, inputs: PrefixInputs) -> tuple[Tensor, Tensor | None]:
        """Return embeddings of images and prompt [B, N, width], and which count; None for all."""
        images = self.images(inputs.pixel_values)
        text = self.language_model.embed_tokens(inputs.input_ids)
        text = text * self.arch.language.width**0.5
        hidden = torch.cat([images, text], dim=1)
        mask, lengths = inputs.image_mask, inputs.prompt_lengths
        if mask is None and lengths is None:
            return hidden, None
        if mask is None:
            seen_images = torch.ones_like(images[:, :, 0], dtype=torch.bool)
        else:
            seen_images = mask.repeat_interleave(self.arch.patches, dim=1)
        if lengths is None:
            seen_text = torch.ones_like(text[:, :, 0], dtype=torch.bool)
        else:
            columns = torch.arange(text.shape[1], device=text.device)
            seen_text = columns[None] < lengths[:, None]
        return hidden, torch.cat([seen_images, seen_text], dim=1)

    def images(self, pixel_values: Tensor) -> Tensor:
        """Return embeddings [B, images * patches, width] of pixels [B, 3 * images, S, S]."""
        batch, channels, height, width = pixel_values.shape
        frames = pixel_values.reshape(batch * (channels // 3), 3, height, width)
        features = self.features(frames)
        embedded: Tensor = self.multi_modal_projector(features)
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

    def velocity(self, prefix: Prefix, flow: Tensor, index: Tensor) -> Tensor:
        """Return the flow's velocity [B, horizon, width] in a step; see `step`."""
        hidden, time = self.suffix(prefix, flow, index)
        places = self._suffix_places(prefix, hidden.shape[1])
        expert = self.action_expert
        for block, past in zip(expert.layers, prefix.pairs, strict=True):
            hidden, _ = block(hidden, places, past, time)
        hidden, _ = expert.norm(hidden, time)
        velocity: Tensor = self.action_out_proj(hidden[:, -flow.shape[1] :])
        return velocity

    def suffix(self, prefix: Prefix, flow: Tensor, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what the expert reads [B, N, width], and what its norms know of the time."""
        # A row for each observation: modules map batches to batches.
        silu, table = nn.functional.silu, self.time_table[index].expand(flow.shape[0], -1)
        actions = self.action_in_proj(flow)
        if prefix.state_token is None:
            return actions, silu(self.time_mlp_out(silu(self.time_mlp_in(table))))
        both = torch.cat([actions, table[:, None].expand_as(actions)], dim=2)
        actions = self.action_time_mlp_out(silu(self.action_time_mlp_in(both)))
        return torch.cat([prefix.state_token, actions], dim=1), None

    def _suffix_places(self, prefix: Prefix, rows: int) -> Places:
        """Where the expert's rows stand: behind the prefix, each sees it and the actions."""
        order = torch.arange(rows, device=prefix.length.device)
        turned = rotation(prefix.length[:, None] + order[None], self.arch.expert.head_dim)
        if prefix.scores is None and prefix.state_token is None:
            return Places(*turned, None)
        before = prefix.scores
        if before is None:
            before = torch.zeros_like(prefix.pairs[0].keys[:, 0, :, 0])
        among = torch.zeros_like(before[:, :1]).expand(-1, rows)[:, None].expand(-1, rows, -1)
        if prefix.state_token is not None:  # it sees the prefix and itself, no action
            among = among + hidden_scores((order[:, None] > 0) | (order[None] == 0))
        scores = torch.cat([before[:, None].expand(-1, rows, -1), among], dim=2)
        return Places(*turned, scores[:, None])
