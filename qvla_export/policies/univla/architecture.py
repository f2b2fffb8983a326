"""The noun `UniVlaArchitecture`: shapes of a UniVLA network."""

from dataclasses import dataclass

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture
from qvla_export.policies.prismatic.sampling import Sampling
from qvla_export.policies.univla.config import UniVlaConfig


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
    # None where the likeliest token is taken.
    sampling: Sampling | None = None

    @property
    def first_latent_token(self) -> int:
        """Lowest id of a latent token: `<ACT_0>`, behind the padding token."""
        return int(self.llama.vocab_size) - self.vocab_padding + 1


def sampling_of(config: UniVlaConfig) -> Sampling | None:
    """Return how tokens are drawn; None where the likeliest is taken."""
    return Sampling(config.temperature, config.top_p) if config.temperature else None
