"""The noun `PiArchitecture`: shapes of a pi0 or pi0.5 network."""

from dataclasses import dataclass

from qvla_export.policies.flow.architecture import FlowArchitecture
from qvla_export.policies.towers import tower_grid


@dataclass(frozen=True)
class PiArchitecture(FlowArchitecture):
    """Shapes of the network and how its flow is integrated; pi0.5's state is in the prompt."""

    @property
    def adaptive(self) -> bool:
        """Whether the expert's norms depend on the time, as in pi0.5."""
        return self.state_width == 0

    @property
    def image_tokens(self) -> int:
        """Tokens of one image: one a patch."""
        return tower_grid(self.siglip) ** 2

    @property
    def expert_reads_state(self) -> bool:
        """Whether the state is a token before the expert's actions, as in pi0."""
        return not self.adaptive

    @property
    def prefix_reads_state(self) -> bool:
        """Whether the state is a token behind the prompt: no."""
        return False
