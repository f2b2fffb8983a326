"""The noun `PiArchitecture`: shapes of a pi0 or pi0.5 network."""

from dataclasses import dataclass

from transformers import SiglipVisionConfig

from qvla_export.policies.flow import FlowSpec


@dataclass(frozen=True)
class GemmaSize:
    """Shapes of a stack of Gemma blocks."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class PiArchitecture:
    """Shapes of the network and how its flow is integrated."""

    siglip: SiglipVisionConfig
    language: GemmaSize
    # As deep as the language model, with its heads: it attends to the language model's keys.
    expert: GemmaSize
    vocab_size: int
    # Numbers of an action and of a state, filled up with zeros; 0: the state is in the prompt.
    action_width: int
    state_width: int
    flow: FlowSpec

    @property
    def adaptive(self) -> bool:
        """Whether the expert's norms depend on the time, as in pi0.5."""
        return self.state_width == 0

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.image_side // int(self.siglip.patch_size)) ** 2  # type: ignore[arg-type]  # as below

    @property
    def image_side(self) -> int:
        """Pixels of a side of an image."""
        return int(self.siglip.image_size)  # type: ignore[arg-type]  # ours are square
