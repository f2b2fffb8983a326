"""The noun `OpenVlaArchitecture`: shapes of an OpenVLA network."""

from dataclasses import dataclass

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture


@dataclass(frozen=True)
class OpenVlaArchitecture(PrismaticArchitecture):
    """Shapes of an OpenVLA network."""

    # Tokens that are decoded one after the other, one a dimension of the action.
    action_dim: int
    # Ids that stand for a bin of an action: the last of the vocabulary, padding apart.
    action_tokens: int

    @property
    def first_action_token(self) -> int:
        """Lowest id of an action token."""
        return int(self.llama.vocab_size) - self.vocab_padding - self.action_tokens
