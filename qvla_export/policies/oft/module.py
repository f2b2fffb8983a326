"""The OpenVLA-OFT network on `transformers` modules.

Two vision towers (DINOv2 with registers, SigLIP), a projector, a Llama decoder with bidirectional
attention, and a parallel action head; or a diffusion head, whose every step is a pass through the
decoder. Sources: openvla-oft `modeling_prismatic.py`,
`action_heads.py`, `projectors.py`; the attention change of `transformers-openvla-oft`.
Parameter names are the upstream ones wherever `transformers` has no module of its own.
"""

import torch
from torch import Tensor

from qvla_export.policies.language_model import LanguageModel
from qvla_export.policies.oft.action_heads import ProprioProjector, action_head
from qvla_export.policies.oft.architecture import OftArchitecture
from qvla_export.policies.oft.diffusion import Ddim, NoisyActionProjector
from qvla_export.policies.oft.film import Film
from qvla_export.policies.prismatic.vision import PrismaticModule


class OftModule(PrismaticModule):
    """Pixels, prompt and state to the normalized action chunk."""

    arch: OftArchitecture

    def __init__(self, arch: OftArchitecture) -> None:
        super().__init__(arch)
        hidden_dim = arch.llama.hidden_size
        self.language_model = LanguageModel(arch.llama, with_head=arch.head == "tokens")
        self.proprio_projector = (
            ProprioProjector(arch.state_dim, hidden_dim) if arch.state_dim else None
        )
        self.action_head = action_head(arch)
        self.film = Film(arch) if arch.film else None
        self.noisy_action_projector: NoisyActionProjector | None = None
        self.ddim: Ddim | None = None
        if arch.head == "diffusion":
            self.noisy_action_projector = NoisyActionProjector(hidden_dim)
            self.ddim = Ddim(arch.diffusion_train_steps, arch.diffusion_steps, hidden_dim)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        state: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Return the head's output for a batch.

        Args:
            pixel_values: float32 [B, 6 * images, S, S].
            input_ids: int64 [B, L], BOS to suffix token; rows shorter than L are padded at the
                end and need `prompt_lengths`.
            state: normalized float32 [B, n], where the policy takes one.
            prompt_lengths: int64 [B]; None if every row has L tokens.
            noise: what a diffusion head begins at.  float32 [B, horizon, dim]

        Returns:
            Normalized actions [B, horizon, dim] (L1, diffusion) or logits
            [B, horizon, dim, vocab] (tokens).
        """
        text = self.text(input_ids)
        language = self.language(text, prompt_lengths)
        context = self.context(self.seen(pixel_values, language), state)
        if self.ddim is None:
            return self.act(self.hidden(context, text, None, prompt_lengths))
        if noise is None:
            raise ValueError("this policy begins at noise")
        actions, device = noise, noise.device
        for number in range(self.arch.diffusion_steps):
            index = torch.full((1,), number, dtype=torch.int64, device=device)
            actions = self.denoise(context, text, actions, index, prompt_lengths)
        return actions

    def text(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of the prompt and, last, of the stop token [B, L + 1, D]."""
        tokens = self.language_model.model.embed_tokens
        stop = torch.full_like(input_ids[:, :1], self.arch.stop_token_id)
        return torch.cat([tokens(input_ids), tokens(stop)], dim=1)

    def language(self, text: Tensor, prompt_lengths: Tensor | None = None) -> Tensor:
        """Return the mean embedding of prompt and stop token [B, D], which FiLM looks at."""
        if prompt_lengths is None:
            return text.mean(dim=1)
        position = torch.arange(text.shape[1], device=text.device)[None]
        counts = (position < prompt_lengths[:, None]) | (position == text.shape[1] - 1)
        return (text * counts[:, :, None]).sum(dim=1) / (prompt_lengths + 1)[:, None]

    def seen(self, pixel_values: Tensor, language: Tensor) -> Tensor:
        """Return patch embeddings [B, images * patches, D]; with FiLM as the instruction has it."""
        if self.film is None:
            return self.patches(pixel_values)
        images = pixel_values.shape[1] // 6
        return self.patches(pixel_values, self.film.modulation(language, images))

    def context(self, patches: Tensor, state: Tensor | None) -> Tensor:
        """Return what stands between BOS and the prompt: patches, and the state's token."""
        if self.proprio_projector is None:
            return patches
        if state is None:
            raise ValueError("this policy needs a state")
        return torch.cat([patches, self.proprio_projector(state)[:, None]], dim=1)

    def denoise(
        self,
        context: Tensor,
        text: Tensor,
        noisy: Tensor,
        index: Tensor,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return the chunk [B, horizon, dim] after one step; `index` int64 [1] says which."""
        context, slots = self.noisy_slots(context, noisy, index)
        return self.after_step(self.hidden(context, text, slots, prompt_lengths), noisy, index)

    def noisy_slots(self, context: Tensor, noisy: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Return the context with the step's time behind it, and what stands in action slots."""
        assert self.ddim is not None and self.noisy_action_projector is not None
        time = self.ddim.time(index).expand(context.shape[0], -1, -1)
        return torch.cat([context, time], dim=1), self.noisy_action_projector(noisy)

    def after_step(self, action_hidden: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """Return the chunk after a step, from the states that predict the noise in it."""
        assert self.ddim is not None
        return self.ddim.step(self.act(action_hidden), noisy, index)

    def hidden(
        self,
        context: Tensor,
        text: Tensor,
        slots: Tensor | None,
        prompt_lengths: Tensor | None,
    ) -> Tensor:
        """Return the decoder's states that predict actions [B, slots, D]."""
        embeddings = self.sequence(context, text, slots, prompt_lengths)
        prompt = text[:, 1:]  # as long as the prompt is
        mask = self.padding_mask(embeddings, prompt, prompt_lengths)
        states = self.language_model(embeddings, mask)
        return self.action_hidden(states, prompt, prompt_lengths)

    def embed(
        self,
        patches: Tensor,
        input_ids: Tensor,
        state: Tensor | None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return [BOS, patches, state, prompt, zeroed action slots, stop] embeddings [B, N, D]."""
        context = self.context(patches, state)
        return self.sequence(context, self.text(input_ids), None, prompt_lengths)

    def sequence(
        self,
        context: Tensor,
        text: Tensor,
        slots: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return [BOS, context, prompt, action slots, stop] embeddings [B, N, D].

        Args:
            context: see `context`.
            text: prompt and stop token, see `text`.
            slots: what stands in action slots; None for zeros.  [B, slots, D]
            prompt_lengths: int64 [B]; None if every row has all tokens.
        """
        stop = text[:, -1:]
        if slots is None:
            slots = torch.zeros_like(stop).expand(-1, self.arch.slots, -1)
        if prompt_lengths is None:
            tail = torch.cat([text[:, 1:-1], slots, stop], dim=1)
        else:
            tail = self._ragged_tail(text[:, 1:-1], slots, stop, prompt_lengths - 1)
        return torch.cat([text[:, :1], context, tail], dim=1)

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
        place = position - lengths[:, None]
        index = place.clamp(0, slots.shape[1] - 1)[:, :, None].expand(-1, -1, text.shape[2])
        is_slot = (place >= 0) & (place < slots.shape[1])
        is_stop = place == slots.shape[1]
        filled = slots.gather(1, index) * is_slot[:, :, None] + stop * is_stop[:, :, None]
        return padded * (place < 0)[:, :, None] + filled

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
