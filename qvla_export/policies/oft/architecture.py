"""The noun `OftArchitecture`: shapes of an OpenVLA-OFT network."""

from dataclasses import dataclass
from typing import Literal

from transformers import Dinov2WithRegistersConfig, LlamaConfig, SiglipVisionConfig


@dataclass(frozen=True)
class OftArchitecture:
    """Shapes of an OpenVLA-OFT network."""

    dino: Dinov2WithRegistersConfig
    siglip: SiglipVisionConfig
    llama: LlamaConfig
    horizon: int
    action_dim: int
    # Length of the proprioceptive state; 0 where the policy takes none.
    state_dim: int
    head: Literal["l1", "tokens"]
    # Hidden width of the L1 head.
    head_dim: int
    stop_token_id: int
    # Rows that pad the vocabulary to a round number; the last real ids are action tokens.
    vocab_padding: int = 0

    @property
    def slots(self) -> int:
        """Action positions in the sequence: one for each dimension of each step."""
        return self.horizon * self.action_dim
