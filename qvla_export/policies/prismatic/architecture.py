"""The noun `PrismaticArchitecture`: shapes of two vision towers and a Llama."""

from dataclasses import dataclass

from transformers import Dinov2WithRegistersConfig, LlamaConfig, SiglipVisionConfig

from qvla_export.policies.towers import tower_grid

# DINOv2 and SigLIP, side by side.
TOWERS = 2


@dataclass(frozen=True)
class PrismaticArchitecture:
    """Shapes that every network of the family has."""

    dino: Dinov2WithRegistersConfig
    siglip: SiglipVisionConfig
    llama: LlamaConfig
    # Rows that pad the vocabulary to a round number; the last real ids are action tokens.
    vocab_padding: int

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return tower_grid(self.dino) ** 2
