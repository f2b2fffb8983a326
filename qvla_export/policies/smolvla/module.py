"""The network of SmolVLA: a prefix that is read once, and the velocity of a flow.

Source: lerobot 0.6.1 `policies/smolvla/modeling_smolvla.py`, `VLAFlowMatching.sample_actions`. What
upstream computes and never reads (the last language block beyond its keys and values, the output
layer) is not here; the keys and values that the expert makes of the prefix are made with it, once.
"""

import torch
from torch import Tensor, nn

from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.attention import KeysValues, Places, rotation
from qvla_export.policies.flow.module import FlowModule, Prefix, PrefixInputs, stand
from qvla_export.policies.hidden_scores import hidden_scores
from qvla_export.policies.smolvla.architecture import SmolVlaArchitecture
from qvla_export.policies.smolvla.blocks import (
    Block,
    LastBlock,
    PrefixAttention,
    RootMeanNorm,
)


class _Prefix(nn.Module):
    """SmolVLM2's language model, up to its last block's keys and values."""

    def __init__(self, size: StackSize, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, size.width)
        blocks: list[nn.Module] = [Block(size) for _ in range(size.depth - 1)]
        self.layers = nn.ModuleList([*blocks, LastBlock(size)])


class _Expert(nn.Module):
    """The action expert's blocks and their final norm."""

    def __init__(self, arch: SmolVlaArchitecture) -> None:
        super().__init__()
        size = arch.expert
        self.layers = nn.ModuleList(
            Block(size, crosses=not arch.attends_itself(i)) for i in range(size.depth)
        )
        self.norm = RootMeanNorm(size)


class SmolVlaModule(FlowModule):
    """Images, words, state and noise to a chunk of actions."""

    arch: SmolVlaArchitecture

    def __init__(self, arch: SmolVlaArchitecture) -> None:
        super().__init__(arch)
        width, inner = arch.expert.width, arch.language.width
        gathered = int(arch.siglip.hidden_size) * arch.scale_factor**2
        self.connector = nn.Linear(gathered, inner, bias=False)
        self.language_model = _Prefix(arch.language, arch.vocab_size)
        self.action_expert = _Expert(arch)
        self.state_proj = nn.Linear(arch.state_width, inner)
        self.action_in_proj = nn.Linear(arch.action_width, width)
        self.action_out_proj = nn.Linear(width, arch.action_width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.keep_times()

    def prefix(self, inputs: PrefixInputs) -> Prefix:
        """Read images, words and state."""
        hidden, seen = self.embed(inputs)
        rows = hidden.shape[1]
        standing = stand(hidden, seen)
        # Images and words do not see the state, which stands last and sees all.
        order = torch.arange(rows, device=hidden.device)
        added = hidden_scores((order[:, None] == rows - 1) | (order[None] < rows - 1))[None, None]
        if standing.scores is not None:
            added = added + standing.scores[:, None, None]
        places = Places(*rotation(standing.positions, self.arch.language.head_dim), added)
        pairs = []
        for block in self.language_model.layers[:-1]:
            hidden, here = block(hidden, places)
            pairs.append(here)
        pairs.append(self.language_model.layers[-1](hidden, places))
        pairs = [self._read(i, pair) for i, pair in enumerate(pairs)]
        return Prefix(pairs, standing.length, standing.scores)

    def _read(self, block: int, kept: KeysValues) -> KeysValues:
        attention = self.action_expert.layers[block].get_submodule("self_attn")
        return attention.keys_values(kept) if isinstance(attention, PrefixAttention) else kept

    def embed(self, inputs: PrefixInputs) -> tuple[Tensor, Tensor | None]:
        """Return embeddings of images, words, state [B, N, width], and which count; None: all."""
        scale = self.arch.language.width**0.5
        images = self.images(inputs.pixel_values) * scale
        text = self.language_model.embed_tokens(inputs.input_ids) * scale
        state = self.state_proj(inputs.state)[:, None]
        hidden = torch.cat([images, text, state], dim=1)
        seen = self.seen_places(inputs, images, text)
        if seen is not None:
            here = torch.ones_like(state[:, :, 0], dtype=torch.bool)
            seen = torch.cat([seen, here], dim=1)
        return hidden, seen

    def embedded_images(self, features: Tensor) -> Tensor:
        """Return the language model's tokens [N, tokens, width] of a tower's features.

        A token gathers a block of patches, row by row.
        """
        side, scale = round(features.shape[1] ** 0.5), self.arch.scale_factor
        grid = features.reshape(-1, side // scale, scale, side // scale, scale, features.shape[2])
        gathered = grid.transpose(2, 3).reshape(features.shape[0], self.arch.image_tokens, -1)
        embedded: Tensor = self.connector(gathered)
        return embedded

    def velocity(self, prefix: Prefix, flow: Tensor, index: Tensor) -> Tensor:
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

    def _places(self, prefix: Prefix, rows: int) -> tuple[Places, Places]:
        """Where actions stand: behind the prefix among themselves, from 0 where they cross."""
        order, size = torch.arange(rows, device=prefix.length.device), self.arch.expert
        before = prefix.scores
        if before is None:
            before = torch.zeros_like(prefix.pairs[0].keys[:, 0, :, 0])
        above = before[:, None].expand(-1, rows, -1)
        # Each action sees those before it.
        later = hidden_scores(order[:, None] >= order[None])[None].expand(above.shape[0], -1, -1)
        behind = rotation(prefix.length[:, None] + order[None], size.head_dim)
        among = Places(*behind, torch.cat([above, later], dim=2)[:, None])
        scores = None if prefix.scores is None else above[:, None]
        return among, Places(*rotation(order[None], size.head_dim), scores)
