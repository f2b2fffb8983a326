"""The noun `SmolVlaArchitecture`: shapes of a SmolVLA network."""

from dataclasses import dataclass

from transformers import SiglipVisionConfig

from qvla_export.policies.flow import FlowSpec


@dataclass(frozen=True)
class StackSize:
    """Shapes of a stack of blocks."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float


@dataclass(frozen=True)
class SmolVlaArchitecture:
    """Shapes of the network and how its flow is integrated."""

    siglip: SiglipVisionConfig
    scale_factor: int
    language: StackSize
    expert: StackSize
    vocab_size: int
    # The expert's block i attends to itself, too, where i is a multiple of it.
    self_attention_every: int
    # Numbers of an action and of a state, filled up with zeros.
    action_width: int
    state_width: int
    flow: FlowSpec

    @property
    def image_side(self) -> int:
        """Pixels of a side of an image."""
        return int(self.siglip.image_size)  # type: ignore[arg-type]  # ours are square

    @property
    def image_tokens(self) -> int:
        """Tokens of one image."""
        grid = self.image_side // int(self.siglip.patch_size)  # type: ignore[arg-type]  # as above
        return (grid // self.scale_factor) ** 2

    def attends_itself(self, block: int) -> bool:
        """Whether a block of the expert attends to the actions beside the prefix."""
        return block % self.self_attention_every == 0
