"""The noun `FlowArchitecture`: shapes of a network with a prefix and an expert that reads it."""

import abc
from dataclasses import dataclass

from transformers import SiglipVisionConfig

from qvla_export.policies.flow.spec import FlowSpec
from qvla_export.policies.towers import tower_side


@dataclass(frozen=True)
class StackSize:
    """Shapes of a stack of blocks."""

    width: int
    depth: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    # Added under the root of the norms; the default is Gemma's.
    eps: float = 1e-6


@dataclass(frozen=True)
class FlowArchitecture(abc.ABC):
    """Shapes of the network and how its flow is integrated."""

    siglip: SiglipVisionConfig
    language: StackSize
    # As deep as the language model, with its heads: it attends to the language model's keys.
    expert: StackSize
    vocab_size: int
    # Numbers of an action and of a state, filled up with zeros; 0: no state is an input.
    action_width: int
    state_width: int
    flow: FlowSpec

    @property
    def image_side(self) -> int:
        """Pixels of a side of an image."""
        return tower_side(self.siglip)

    @property
    @abc.abstractmethod
    def image_tokens(self) -> int:
        """Tokens of one image."""

    @property
    @abc.abstractmethod
    def expert_reads_state(self) -> bool:
        """Whether the state is a token before the expert's actions."""

    @property
    @abc.abstractmethod
    def prefix_reads_state(self) -> bool:
        """Whether the state is a token behind the prompt."""
