"""The network of pi0 and pi0.5: a prefix that is read once, and the velocity of a flow.

Source: openpi `models_pytorch/pi0_pytorch.py`, `PI0Pytorch.sample_actions`. What upstream computes
and never reads (the last language block beyond its keys and values, output layers) is not here.
"""

import torch
from torch import Tensor, nn

from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.attention import Places, rotation
from qvla_export.policies.flow.module import FlowModule, Prefix, PrefixInputs, stand
from qvla_export.policies.hidden_scores import hidden_scores
from qvla_export.policies.pi.architecture import PiArchitecture
from qvla_export.policies.pi.gemma import AdaptiveNorm, GemmaBlock, GemmaNorm, LastGemmaBlock


class _Prefix(nn.Module):
    """PaliGemma's language model, up to its last block's keys and values."""

    def __init__(self, size: StackSize, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, size.width)
        blocks: list[nn.Module] = [GemmaBlock(size) for _ in range(size.depth - 1)]
        self.layers = nn.ModuleList([*blocks, LastGemmaBlock(size)])


class _Expert(nn.Module):
    """The action expert's blocks and their final norm."""

    def __init__(self, size: StackSize, adaptive: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GemmaBlock(size, adaptive) for _ in range(size.depth))
        self.norm = (AdaptiveNorm if adaptive else GemmaNorm)(size)


class PiModule(FlowModule):
    """Images, prompt, state and noise to a chunk of actions."""

    arch: PiArchitecture

    def __init__(self, arch: PiArchitecture) -> None:
        super().__init__(arch)
        width = arch.expert.width
        self.multi_modal_projector = nn.Linear(arch.siglip.hidden_size, arch.language.width)
        self.language_model = _Prefix(arch.language, arch.vocab_size)
        self.action_expert = _Expert(arch.expert, arch.adaptive)
        self.action_in_proj = nn.Linear(arch.action_width, width)
        self.action_out_proj = nn.Linear(width, arch.action_width)
        if arch.adaptive:
            self.time_mlp_in = nn.Linear(width, width)
            self.time_mlp_out = nn.Linear(width, width)
        else:
            self.state_proj = nn.Linear(arch.state_width, width)
            self.action_time_mlp_in = nn.Linear(2 * width, width)
            self.action_time_mlp_out = nn.Linear(width, width)
        self.keep_times()

    def prefix(self, inputs: PrefixInputs) -> Prefix:
        """Read images, prompt and state."""
        hidden, seen = self.embed(inputs)
        standing = stand(hidden, seen)
        added = None if standing.scores is None else standing.scores[:, None, None]
        places = Places(*rotation(standing.positions, self.arch.language.head_dim), added)
        pairs = []
        for block in self.language_model.layers[:-1]:
            hidden, here = block(hidden, places)
            pairs.append(here)
        pairs.append(self.language_model.layers[-1](hidden, places))
        token = None if self.arch.adaptive else self.state_proj(inputs.state)[:, None]
        return Prefix(pairs, standing.length, standing.scores, token)

    def embed(self, inputs: PrefixInputs) -> tuple[Tensor, Tensor | None]:
        """Return embeddings of images and prompt [B, N, width], and which count; None for all."""
        images = self.images(inputs.pixel_values)
        text = self.language_model.embed_tokens(inputs.input_ids)
        text = text * self.arch.language.width**0.5
        return torch.cat([images, text], dim=1), self.seen_places(inputs, images, text)

    def embedded_images(self, features: Tensor) -> Tensor:
        """Return the language model's tokens [N, patches, width] of a tower's features."""
        embedded: Tensor = self.multi_modal_projector(features)
        return embedded

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
