"""The noun `UniVlaArchitecture`: shapes of a UniVLA network."""

from dataclasses import dataclass

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture


@dataclass(frozen=True)
class DecoderShape:
    """Shape of what makes a chunk of latent tokens."""

    width: int
    heads: int
    # Inner width of its gated MLPs.
    mlp: int


@dataclass(frozen=True)
class UniVlaArchitecture(PrismaticArchitecture):
    """Shapes of a UniVLA network."""

    horizon: int
    action_dim: int
    # Tokens that are decoded for one chunk, and those that each is chosen from.
    latent_tokens: int
    codebook: int
    decoder: DecoderShape

    @property
    def first_latent_token(self) -> int:
        """Lowest id of a latent token: `<ACT_0>`, behind the padding token."""
        return int(self.llama.vocab_size) - self.vocab_padding + 1
