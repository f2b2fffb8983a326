"""What a `Policy` that decodes tokens does, whatever they stand for."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.prismatic.decoding import Decoded, TokenModule
from qvla_export.policies.prismatic.policy import PrismaticPolicy
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.observation import Observation


@dataclass(frozen=True, repr=False)
class TokenPolicy(PrismaticPolicy):
    """A loaded policy that decodes tokens; see `Policy` for the meaning of its members."""

    module: TokenModule

    def batch(self, observations: Sequence[Observation]) -> PolicyBatch:
        """Preprocess observations into one padded batch, with the tokens the policy chooses now."""
        return self.with_tokens(self.inputs(observations))

    def with_tokens(self, batch: PolicyBatch) -> PolicyBatch:
        """Return a batch with the tokens that the policy chooses now, and what each choice gets.

        Raises:
            CheckpointError: its weights were left on disk.
        """
        if self.on_disk is not None:
            raise CheckpointError(
                "a policy that decodes token by token must be in memory to choose them; open it "
                "whole"
            )
        decoded = self.decoded(batch)
        with torch.no_grad():
            return replace(batch, tokens=decoded.tokens, shares=self.module.shares(decoded))

    def token_logits(self, batch: PolicyBatch) -> Tensor:
        """Return logits of the tokens [B, tokens, choices], each given the batch's before it."""
        return self.module.logits(self.teacher_forced(batch))

    def teacher_forced(self, batch: PolicyBatch, shares: Tensor | None = None) -> Decoded:
        """Return what a pass over the batch's tokens finds; they are not decoded.

        Args:
            batch: with or without tokens.
            shares: see `TokenModule.hidden_given`.
        """
        tokens, lengths = self.tokens_of(batch), batch.prompt_lengths
        return self.module.hidden_given(
            batch.pixel_values, batch.input_ids, tokens, lengths, shares
        )

    def probe_decoded(self) -> Decoded:
        """Return what one pass finds over an empty image, the shortest prompt and first tokens."""
        pixels, ids = self.probe_inputs()
        shape = (1, self.module.vocabulary.steps)
        tokens = torch.zeros(shape, dtype=torch.int64, device=ids.device)
        return self.module.hidden_given(pixels, ids, tokens)

    def decoded(self, batch: PolicyBatch) -> Decoded:
        """Return what decoding finds now."""
        return self.module.decode(
            batch.pixel_values, batch.input_ids, batch.prompt_lengths, batch.noise
        )

    def tokens_of(self, batch: PolicyBatch) -> Tensor:
        """Return the batch's tokens; where it has none, those that the policy chooses now."""
        return batch.tokens if batch.tokens is not None else self.decoded(batch).tokens
