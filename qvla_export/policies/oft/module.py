"""The OpenVLA-OFT network on `transformers` modules.

Two vision towers (DINOv2 with registers, SigLIP), a projector, a Llama decoder with bidirectional
attention, and a parallel action head. Sources: openvla-oft `modeling_prismatic.py`,
`action_heads.py`, `projectors.py`; the attention change of `transformers-openvla-oft`.
Parameter names are the upstream ones wherever `transformers` has no module of its own.
"""

import torch
from torch import Tensor, nn

from qvla_export.policies.language_model import LanguageModel
from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.prismatic.vision import PrismaticModule


class ProprioProjector(nn.Module):
    """State vector to one token."""

    def __init__(self, state_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(state_dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, state: Tensor) -> Tensor:
        """Map the normalized state [B, n] to [B, hidden]."""
        token: Tensor = self.fc2(nn.functional.gelu(self.fc1(state)))
        return token


class MLPResNetBlock(nn.Module):
    """Pre-norm residual block of the L1 head."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden + ffn(hidden)."""
        output: Tensor = hidden + self.ffn(hidden)
        return output


class MLPResNet(nn.Module):
    """The L1 head's body."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.mlp_resnet_blocks = nn.ModuleList(MLPResNetBlock(hidden_dim) for _ in range(2))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, horizon, input_dim] to [B, horizon, output_dim]."""
        hidden = torch.relu(self.fc1(self.layer_norm1(features)))
        for block in self.mlp_resnet_blocks:
            hidden = block(hidden)
        output: Tensor = self.fc2(self.layer_norm2(hidden))
        return output


class L1RegressionActionHead(nn.Module):
    """The hidden states of a step side by side -> its normalized action."""

    def __init__(self, arch: OftArchitecture) -> None:
        super().__init__()
        width = arch.action_dim * arch.llama.hidden_size
        self.model = MLPResNet(width, arch.head_dim, arch.action_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map [B, horizon, dim * hidden] to [B, horizon, dim]."""
        actions: Tensor = self.model(features)
        return actions


class OftModule(PrismaticModule):
    """One forward pass from pixels, prompt and state to the normalized action chunk."""

    arch: OftArchitecture

    def __init__(self, arch: OftArchitecture) -> None:
        super().__init__(arch)
        hidden_dim = arch.llama.hidden_size
        self.language_model = LanguageModel(arch.llama, with_head=arch.head == "tokens")
        self.proprio_projector = (
            ProprioProjector(arch.state_dim, hidden_dim) if arch.state_dim else None
        )
        self.action_head = L1RegressionActionHead(arch) if arch.head == "l1" else None

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        state: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the head's output for a batch.

        Args:
            pixel_values: float32 [B, 6 * images, S, S].
            input_ids: int64 [B, L], BOS to suffix token; rows shorter than L are padded at the
                end and need `prompt_lengths`.
            state: normalized float32 [B, n], where the policy takes one.
            prompt_lengths: int64 [B]; None if every row has L tokens.

        Returns:
            Normalized actions [B, horizon, dim] (L1) or logits [B, horizon, dim, vocab] (tokens).
        """
        embeddings = self.embed(self.patches(pixel_values), input_ids, state, prompt_lengths)
        mask = self.padding_mask(embeddings, input_ids, prompt_lengths)
        hidden = self.language_model(embeddings, mask)
        return self.act(self.action_hidden(hidden, input_ids, prompt_lengths))

    def embed(
        self,
        patches: Tensor,
        input_ids: Tensor,
        state: Tensor | None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return [BOS, patches, state, prompt, zeroed action slots, stop] embeddings [B, N, D]."""
        tokens = self.language_model.model.embed_tokens
        text = tokens(input_ids)
        stop = tokens(torch.full_like(input_ids[:, :1], self.arch.stop_token_id))
        slots = torch.zeros_like(stop).expand(-1, self.arch.slots, -1)
        if prompt_lengths is None:
            tail = torch.cat([text[:, 1:], slots, stop], dim=1)
        else:
            tail = self._ragged_tail(text[:, 1:], slots, stop, prompt_lengths - 1)
        middle = [patches]
        if self.proprio_projector is not None:
            if state is None:
                raise ValueError("this policy needs a state")
            middle.append(self.proprio_projector(state)[:, None])
        return torch.cat([text[:, :1], *middle, tail], dim=1)

    def action_hidden(
        self, hidden: Tensor, input_ids: Tensor, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Return the hidden states that predict actions [B, slots, D].

        The slice starts one position before the first slot: the usual next-token shift.
        """
        slots = self.arch.slots
        if prompt_lengths is None:
            return hidden[:, -(slots + 2) : -2]
        longest = input_ids.shape[1]
        first = hidden.shape[1] - (slots + 2) - (longest - prompt_lengths)
        index = first[:, None] + torch.arange(slots, device=hidden.device)
        return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1]))

    def act(self, action_hidden: Tensor) -> Tensor:
        """Apply the action head to [B, slots, D]."""
        batch, horizon, dim = action_hidden.shape[0], self.arch.horizon, self.arch.action_dim
        if self.action_head is not None:
            actions: Tensor = self.action_head(action_hidden.reshape(batch, horizon, -1))
            return actions
        assert self.language_model.lm_head is not None
        logits: Tensor = self.language_model.lm_head(action_hidden)
        return logits.reshape(batch, horizon, dim, -1)

    def _ragged_tail(self, text: Tensor, slots: Tensor, stop: Tensor, lengths: Tensor) -> Tensor:
        """Slots and stop directly after each row's own prompt; padding goes to the end."""
        position = torch.arange(text.shape[1] + slots.shape[1] + 1, device=text.device)[None]
        padded = torch.cat([text, torch.zeros_like(slots), torch.zeros_like(stop)], dim=1)
        is_text = position < lengths[:, None]
        is_stop = position == lengths[:, None] + slots.shape[1]
        return padded * is_text[:, :, None] + stop * is_stop[:, :, None]

    def padding_mask(
        self, embeddings: Tensor, input_ids: Tensor, prompt_lengths: Tensor | None
    ) -> Tensor | None:
        """Return the additive mask [B, 1, 1, N] that hides padding; None if there is none."""
        if prompt_lengths is None:
            return None
        valid = embeddings.shape[1] - (input_ids.shape[1] - prompt_lengths)
        padding = torch.arange(embeddings.shape[1], device=valid.device)[None] >= valid[:, None]
        lowest = torch.finfo(embeddings.dtype).min
        mask = torch.zeros(padding.shape, dtype=embeddings.dtype, device=valid.device)
        return mask.masked_fill(padding, lowest)[:, None, None, :]
