"""The noun `SmolVlaArchitecture`: shapes of a SmolVLA network."""

from dataclasses import dataclass

from qvla_export.policies.flow.architecture import FlowArchitecture
from qvla_export.policies.towers import tower_grid


@dataclass(frozen=True)
class SmolVlaArchitecture(FlowArchitecture):
    """Shapes of the network and how its flow is integrated."""

    # Side of the blocks of patches that become one token.
    scale_factor: int
    # The expert's block i attends to itself, too, where i is a multiple of it.
    self_attention_every: int

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: one a block of patches."""
        return (tower_grid(self.siglip) // self.scale_factor) ** 2

    @property
    def expert_reads_state(self) -> bool:
        """Whether the state is a token before the expert's actions: no."""
        return False

    @property
    def prefix_reads_state(self) -> bool:
        """Whether the state is a token behind the prompt: yes."""
        return True

    def attends_itself(self, block: int) -> bool:
        """Whether a block of the expert attends to the actions beside the prefix."""
        return block % self.self_attention_every == 0
