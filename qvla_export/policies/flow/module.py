"""A network with a prefix that is read once a chunk, and the velocity of a flow that reads it."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import SiglipVisionModel

from qvla_export.policies.flow.architecture import FlowArchitecture
from qvla_export.policies.flow.attention import KeysValues
from qvla_export.policies.flow.tower import patch_features
from qvla_export.policies.hidden_scores import hidden_scores


@dataclass(frozen=True)
class PrefixInputs:
    """Images, prompt and state of several observations."""

    # [-1, 1], images one after the other.  float32 [B, 3 * images, S, S]
    pixel_values: Tensor
    # Rows padded at the end.  int64 [B, L]
    input_ids: Tensor
    # float32 [B, n]; None where no state is an input.
    state: Tensor | None = None
    # Which images are there; None for all.  bool [B, images]
    image_mask: Tensor | None = None
    # int64 [B]; None if every row has L tokens.
    prompt_lengths: Tensor | None = None


@dataclass(frozen=True)
class Prefix:
    """What every step of a flow reads, computed once a chunk."""

    # For each block of the expert.
    pairs: Sequence[KeysValues]
    # Positions that count: those of masked images and of padding do not.  int64 [B]
    length: Tensor
    # Added to scores of the prefix's positions; None where all are seen.  [B, N]
    scores: Tensor | None = None
    # The state as a token; None where the expert reads none.  [B, 1, width of the expert]
    state_token: Tensor | None = None


@dataclass(frozen=True)
class Standing:
    """Where the positions of a prefix stand."""

    # From 0, positions that do not count left out.  int64 [B or 1, N]
    positions: Tensor
    # As in `Prefix`.
    length: Tensor
    scores: Tensor | None


class FlowModule(nn.Module, abc.ABC):
    """Images, prompt, state and noise to a chunk of actions."""

    arch: FlowArchitecture
    action_in_proj: nn.Linear
    # What stands for the time in each step.  float32 [steps, width of the expert]
    time_table: Tensor

    def __init__(self, arch: FlowArchitecture) -> None:
        super().__init__()
        self.arch = arch
        self.vision_tower = SiglipVisionModel(arch.siglip)

    @abc.abstractmethod
    def prefix(self, inputs: PrefixInputs) -> Prefix:
        """Read images, prompt and state."""

    @abc.abstractmethod
    def velocity(self, prefix: Prefix, flow: Tensor, index: Tensor) -> Tensor:
        """Return the flow's velocity [B, horizon, width] in a step; see `step`."""

    @abc.abstractmethod
    def embedded_images(self, features: Tensor) -> Tensor:
        """Return the language model's tokens [N, image tokens, width] of a tower's features."""

    def forward(self, inputs: PrefixInputs, noise: Tensor) -> Tensor:
        """Return the flow's end for noise [B, horizon, width]; differentiable in all steps."""
        prefix, flow = self.prefix(inputs), noise
        for number in range(self.arch.flow.steps):
            index = torch.full((1,), number, dtype=torch.int64, device=noise.device)
            flow = self.step(prefix, flow, index)
        return flow

    @torch.no_grad()
    def flows(self, inputs: PrefixInputs, noise: Tensor) -> Tensor:
        """Return where the flow stands before each step [B, steps, horizon, width]."""
        prefix, found = self.prefix(inputs), [noise]
        for number in range(self.arch.flow.steps - 1):
            index = torch.full((1,), number, dtype=torch.int64, device=noise.device)
            found.append(self.step(prefix, found[-1], index))
        return torch.stack(found, dim=1)

    def moves(self, inputs: PrefixInputs, flows: Tensor) -> Tensor:
        """Return what each step adds, from where the flow stands before it.

        Args:
            inputs: as in `forward`.
            flows: from `flows`.

        Returns:
            Differentiable in each step by itself.  [B, steps * horizon, width]
        """
        prefix, found = self.prefix(inputs), []
        for number, flow in enumerate(flows.unbind(dim=1)):
            index = torch.full((1,), number, dtype=torch.int64, device=flow.device)
            found.append(self.step(prefix, flow, index) - flow)
        return torch.cat(found, dim=1)

    def step(self, prefix: Prefix, flow: Tensor, index: Tensor) -> Tensor:
        """Return the flow after one Euler step.

        Args:
            prefix: from `prefix`.
            flow: where it stands.  float32 [B, horizon, width]
            index: of the step, from 0.  int64 [1]
        """
        return flow + self.arch.flow.step * self.velocity(prefix, flow, index)

    def images(self, pixel_values: Tensor) -> Tensor:
        """Return embeddings [B, images * tokens, width] of pixels [B, 3 * images, S, S]."""
        batch, channels, height, width = pixel_values.shape
        frames = pixel_values.reshape(batch * (channels // 3), 3, height, width)
        embedded = self.embedded_images(self.features(frames))
        return embedded.reshape(batch, -1, embedded.shape[-1])

    def features(self, frames: Tensor) -> Tensor:
        """Return the tower's patch features [N, patches, width] of frames [N, 3, S, S]."""
        return patch_features(self.vision_tower, frames)

    def keep_times(self) -> None:
        """Keep the table of times where the weights are, on device "meta" too."""
        table = torch.from_numpy(self.arch.flow.time_table(self.arch.expert.width))
        table = table.to(self.action_in_proj.weight.device)
        self.register_buffer("time_table", table, persistent=False)

    def seen_places(self, inputs: PrefixInputs, images: Tensor, text: Tensor) -> Tensor | None:
        """Return which embeddings of images and prompt count.  bool [B, N]; None for all"""
        mask, lengths = inputs.image_mask, inputs.prompt_lengths
        if mask is None and lengths is None:
            return None
        of_images, of_text = (
            torch.ones_like(part[:, :, 0], dtype=torch.bool) for part in (images, text)
        )
        if mask is not None:
            of_images = mask.repeat_interleave(self.arch.image_tokens, dim=1)
        if lengths is not None:
            columns = torch.arange(text.shape[1], device=text.device)
            of_text = columns[None] < lengths[:, None]
        return torch.cat([of_images, of_text], dim=1)


def stand(hidden: Tensor, seen: Tensor | None) -> Standing:
    """Return where embeddings [B, N, width] stand, of which those count that are `seen`.

    Numbers of positions are sums of floats, which hold them exactly: TensorRT adds up no whole
    numbers. They are of what the tracer knows to vary.
    """
    if seen is None:
        length = torch.ones_like(hidden[:, :, 0]).sum(dim=1).to(torch.int64)
        return Standing(torch.arange(hidden.shape[1], device=hidden.device)[None], length, None)
    count = seen.to(torch.float32).cumsum(dim=1).to(torch.int64)
    return Standing(count - 1, count[:, -1], hidden_scores(seen))
