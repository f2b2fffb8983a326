"""The OpenVLA network on `transformers` modules: greedy decoding, and one pass over known tokens.

Source: openvla `modeling_prismatic.py`, `OpenVLAForActionPrediction.predict_action`. The output
layer has the rows of the action tokens alone: a token outside, which upstream would clip to the
nearest bin, cannot win here.
"""

import torch
from torch import Tensor

from qvla_export.policies.cached_decoder import CachedDecoder
from qvla_export.policies.openvla.architecture import OpenVlaArchitecture
from qvla_export.policies.prismatic.vision import PrismaticModule


class OpenVlaModule(PrismaticModule):
    """Pixels and prompt to the tokens of one action."""

    arch: OpenVlaArchitecture
    # Centre of each action token's bin.  float32 [action tokens]
    token_centers: Tensor

    def __init__(self, arch: OpenVlaArchitecture, token_centers: Tensor) -> None:
        super().__init__(arch)
        self.language_model = CachedDecoder(arch.llama, arch.action_tokens)
        # On device "meta" where the weights are: parts are traced there.
        table = token_centers.to(self.projector.fc1.weight.device)
        self.register_buffer("token_centers", table, persistent=False)

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        tokens: Tensor,
        prompt_lengths: Tensor | None = None,
    ) -> Tensor:
        """Return logits of every action token in one pass, given the tokens before it.

        Args:
            pixel_values: float32 [B, 6, S, S].
            input_ids: int64 [B, L], BOS to suffix token; rows shorter than L are padded at the
                end and need `prompt_lengths`.
            tokens: action tokens, counted from the lowest id of one; the last one of a row
                decides nothing.  int64 [B, dim]
            prompt_lengths: int64 [B]; None if every row has L tokens.

        Returns:
            float32 [B, dim, action tokens]
        """
        sequence, length = self.embed(self.patches(pixel_values), input_ids, prompt_lengths)
        follow = self.embed_tokens(tokens[:, :-1])
        hidden = self.language_model(torch.cat([sequence, follow], dim=1), length + follow.shape[1])
        logits: Tensor = self.language_model.lm_head(hidden[:, -tokens.shape[1] :])
        return logits

    @torch.no_grad()
    def decode(
        self, pixel_values: Tensor, input_ids: Tensor, prompt_lengths: Tensor | None = None
    ) -> Tensor:
        """Return the action tokens of greedy decoding, counted from the lowest id of one.

        Every position is computed once; keys and values are kept.  int64 [B, dim]
        """
        decoder, dim = self.language_model, self.arch.action_dim
        hidden, length = self.embed(self.patches(pixel_values), input_ids, prompt_lengths)
        empty = decoder.empty_cache(hidden, hidden.shape[1] + dim - 1)
        depth, tokens = len(decoder.model.layers), []
        caches = [empty] * depth
        for _ in range(dim):
            hidden, caches = decoder.blocks(hidden, length, caches, 0, depth)
            tokens.append(decoder.logits(hidden[:, -1:]).argmax(dim=-1))
            hidden, length = self.embed_tokens(tokens[-1]), length + 1
        return torch.cat(tokens, dim=1)

    def embed(
        self, patches: Tensor, input_ids: Tensor, prompt_lengths: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return [BOS, patches, prompt] embeddings that end together, and their lengths.

        float32 [B, N, D], padded at the front; int64 [B].
        """
        text = self.language_model.model.embed_tokens(input_ids)
        sequence = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
        positions = sequence.shape[1]
        if prompt_lengths is None:
            # Of what the tracer knows to vary, not of a number.
            return sequence, torch.ones_like(sequence[:, :, 0], dtype=torch.int64).sum(dim=1)
        missing = input_ids.shape[1] - prompt_lengths
        source = torch.arange(positions, device=text.device)[None] - missing[:, None]
        index = source.clamp(min=0)[:, :, None].expand(-1, -1, sequence.shape[2])
        return sequence.gather(1, index), positions - missing

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """Return the embeddings of action tokens, counted from the lowest id of one."""
        embedded: Tensor = self.language_model.model.embed_tokens(
            tokens + self.arch.first_action_token
        )
        return embedded
