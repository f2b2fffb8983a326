"""A network on Prismatic's towers that decodes tokens one after the other, each given those before.

What the tokens stand for is the family's: of the output layer it has the rows of its own tokens
alone, so no other token can win. The likeliest is taken, or one is drawn: see `sampling`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qvla_export.policies.cached_decoder import CachedDecoder
from qvla_export.policies.prismatic.architecture import PrismaticArchitecture
from qvla_export.policies.prismatic.sampling import Sampling
from qvla_export.policies.prismatic.vision import PrismaticModule


@dataclass(frozen=True)
class TokenVocabulary:
    """The tokens that a network chooses among; ids that follow each other."""

    # Lowest id.
    first: int
    tokens: int
    # Tokens that are decoded for one action or chunk.
    steps: int


@dataclass(frozen=True)
class Decoded:
    """What decoding found, or one pass over tokens that are known."""

    # Counted from the vocabulary's first.  int64 [B, steps]
    tokens: Tensor
    # Final norm's output of the prompt and of every token but the last, which is never read.
    # Rows end together.  [B, N + steps - 1, D]
    hidden: Tensor
    # Positions of each row that are no padding, those of tokens included.  int64 [B]
    length: Tensor


class TokenModule(PrismaticModule):
    """Pixels and prompt to tokens, and to the hidden states that predict them."""

    def __init__(
        self,
        arch: PrismaticArchitecture,
        vocabulary: TokenVocabulary,
        sampling: Sampling | None = None,
    ) -> None:
        """Build it; `sampling` is None where the likeliest token is taken."""
        super().__init__(arch)
        self.vocabulary = vocabulary
        self.sampling = sampling
        self.language_model = CachedDecoder(arch.llama, vocabulary.tokens)

    def hidden_given(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        tokens: Tensor,
        prompt_lengths: Tensor | None = None,
        shares: Tensor | None = None,
    ) -> Decoded:
        """Return the hidden states of one pass over the prompt and the tokens that follow it.

        With `shares` of a second one, in which the embedding of each token moves as its expectation
        does: a token that is about to become another one counts before it does, and by a gradient.

        Args:
            pixel_values: float32 [B, 6, S, S].
            input_ids: int64 [B, L], BOS to suffix token; rows shorter than L are padded at the
                end and need `prompt_lengths`.
            tokens: counted from the lowest id of one; the last one of a row decides nothing.
                int64 [B, steps]
            prompt_lengths: int64 [B]; None if every row has L tokens.
            shares: what each choice got when the tokens were chosen.
                float32 [B, steps, tokens of the vocabulary]
        """
        sequence, length = self.embed(self.patches(pixel_values), input_ids, prompt_lengths)
        follow = self.embed_tokens(tokens[:, :-1])
        length = length + follow.shape[1]
        hidden = self.language_model(torch.cat([sequence, follow], dim=1), length)
        decoded = Decoded(tokens, hidden, length)
        if shares is None:
            return decoded
        first, count = self.vocabulary.first, self.vocabulary.tokens
        embeddings = self.language_model.model.embed_tokens.weight[first : first + count]
        gained = self.shares(decoded) - shares
        moved = follow + gained[:, :-1] @ embeddings
        hidden = self.language_model(torch.cat([sequence, moved], dim=1), length)
        return Decoded(tokens, hidden, length)

    def logits(self, decoded: Decoded) -> Tensor:
        """Return the logits of all tokens, each given those before it.

        float32 [B, steps, tokens of the vocabulary]
        """
        hidden = decoded.hidden[:, -decoded.tokens.shape[1] :]
        logits: Tensor = self.language_model.lm_head(hidden)
        return logits

    def shares(self, decoded: Decoded) -> Tensor:
        """Return what each choice of a token gets, given the tokens before it; see `logits`."""
        temperature = 1.0 if self.sampling is None else self.sampling.temperature
        return (self.logits(decoded) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def decode(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        prompt_lengths: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Decoded:
        """Return the tokens that are decoded.

        Every position is computed once; keys and values are kept.

        Args:
            pixel_values, input_ids, prompt_lengths: see `hidden_given`.
            noise: what tokens are drawn by, where they are.  float32 [B, steps, tokens]
        """
        decoder, steps = self.language_model, self.vocabulary.steps
        hidden, length = self.embed(self.patches(pixel_values), input_ids, prompt_lengths)
        empty = decoder.empty_cache(hidden, hidden.shape[1] + steps - 1)
        depth = len(decoder.model.layers)
        caches, tokens, states = [empty] * depth, [], []
        for step in range(steps):
            hidden, caches = decoder.blocks(hidden, length, caches, 0, depth)
            states.append(decoder.model.norm(hidden))
            numbers = None if noise is None else noise[:, step : step + 1]
            tokens.append(self.choose(decoder.lm_head(states[-1][:, -1:]), numbers))
            if step + 1 < steps:
                hidden, length = self.embed_tokens(tokens[-1]), length + 1
        return Decoded(torch.cat(tokens, dim=1), torch.cat(states, dim=1), length)

    def choose(self, logits: Tensor, numbers: Tensor | None) -> Tensor:
        """Return the next token of logits [B, 1, tokens].  int64 [B, 1]"""
        if self.sampling is None:
            return logits.argmax(dim=-1)
        assert numbers is not None
        return self.sampling.choose(logits, numbers)

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
        """Return the embeddings of tokens, counted from the lowest id of one."""
        embedded: Tensor = self.language_model.model.embed_tokens(tokens + self.vocabulary.first)
        return embedded
