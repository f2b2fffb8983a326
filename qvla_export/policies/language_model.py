"""The Llama decoder that families share; it attends in both directions."""

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel


class LanguageModel(nn.Module):
    """Llama body and, for token policies, its output layer."""

    def __init__(self, llama: LlamaConfig, with_head: bool) -> None:
        super().__init__()
        self.model = LlamaModel(llama)
        for layer in self.model.layers:
            # The fork of openvla-oft attends in both directions over the whole sequence.
            attention = layer.self_attn
            assert isinstance(attention, nn.Module)
            attention.is_causal = False  # type: ignore[assignment]  # a plain attribute
        self.lm_head = (
            nn.Linear(llama.hidden_size, llama.vocab_size, bias=False) if with_head else None
        )

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, first: int = 0, last: int | None = None
    ) -> Tensor:
        """Run the blocks [first, last) on hidden states [B, N, hidden].

        The final norm follows the last block of all, which `last` = None stands for; `mask` is
        additive [B, 1, 1, N].
        """
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.model.rotary_emb(hidden, position_ids=positions)
        for layer in self.model.layers[first:last]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        if last is None or last == len(self.model.layers):
            hidden = self.model.norm(hidden)
        return hidden
