"""The noun `OftArchitecture`: shapes of an OpenVLA-OFT network."""

from dataclasses import dataclass
from typing import Literal

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture


@dataclass(frozen=True)
class OftArchitecture(PrismaticArchitecture):
    """Shapes of an OpenVLA-OFT network."""

    horizon: int
    action_dim: int
    # Length of the proprioceptive state; 0 where the policy takes none.
    state_dim: int
    head: Literal["l1", "tokens", "diffusion"]
    # Hidden width of the L1 or the diffusion head.
    head_dim: int
    stop_token_id: int
    # Steps of the noise that the diffusion head was trained with, and that it takes.
    diffusion_train_steps: int = 50
    diffusion_steps: int = 50
    # Whether the instruction modulates the towers.
    film: bool = False

    @property
    def slots(self) -> int:
        """Action positions in the sequence: one for each dimension of each step."""
        return self.horizon * self.action_dim
