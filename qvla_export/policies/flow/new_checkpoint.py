"""Sizes of a new, untrained network with a flow; families add what else theirs have."""

from dataclasses import dataclass

from transformers import SiglipVisionConfig

from qvla_export.policies.flow.architecture import StackSize
from qvla_export.policies.flow.tower import siglip_config


@dataclass(frozen=True)
class FlowSize:
    """Widths and depths of a network; every width a multiple of 64 quantizes without padding."""

    image_size: int = 56
    patch_size: int = 14
    vision_dim: int = 64
    vision_mlp: int = 128
    vision_depth: int = 2
    language_dim: int = 64
    language_mlp: int = 128
    expert_dim: int = 64
    expert_mlp: int = 128
    # Of language model and expert, whose heads are the same.
    depth: int = 4
    heads: int = 4
    head_dim: int = 16
    vocab_size: int = 512
    # Numbers that an action and a state are filled up to with zeros.
    action_width: int = 32

    def tower(self, heads: int) -> SiglipVisionConfig:
        """Return the configuration of the vision tower, with as many heads."""
        return siglip_config(
            width=self.vision_dim,
            depth=self.vision_depth,
            heads=heads,
            mlp=self.vision_mlp,
            patch=self.patch_size,
            image_size=self.image_size,
        )

    def stacks(self, kv_heads: int, eps: float = 1e-6) -> tuple[StackSize, StackSize]:
        """Return the shapes of language model and expert, with heads of keys and norms' eps."""
        of_both = (self.heads, kv_heads, self.head_dim, eps)
        return (
            StackSize(self.language_dim, self.depth, self.language_mlp, *of_both),
            StackSize(self.expert_dim, self.depth, self.expert_mlp, *of_both),
        )
