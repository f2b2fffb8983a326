"""The two vision towers and the projector on `transformers` modules.

Source: `modeling_prismatic.py` of openvla and openvla-oft. Parameter names are the upstream ones
wherever `transformers` has no module of its own.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersModel, SiglipVisionModel

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture


class VisionBackbone(nn.Module):
    """Both towers up to their second-to-last block, features side by side."""

    def __init__(self, arch: PrismaticArchitecture) -> None:
        super().__init__()
        self.featurizer = Dinov2WithRegistersModel(arch.dino)
        self.fused_featurizer = SiglipVisionModel(arch.siglip)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return patch features [B, images * patches, dino + siglip] of [B, 6 * images, S, S]."""
        towers = [self.features(pixel_values, "dino"), self.features(pixel_values, "siglip")]
        return torch.cat(towers, dim=-1)

    def features(self, pixel_values: Tensor, tower: Literal["dino", "siglip"]) -> Tensor:
        """Return one tower's features [B, images * patches, width] of [B, 6 * images, S, S]."""
        batch, channels, height, width = pixel_values.shape
        frames = pixel_values.reshape(batch * (channels // 6), 6, height, width)
        found = self._dino(frames[:, :3]) if tower == "dino" else self._siglip(frames[:, 3:])
        return found.reshape(batch, -1, found.shape[-1])

    def _dino(self, frames: Tensor) -> Tensor:
        embeddings = self.featurizer.embeddings
        positions = embeddings.position_embeddings
        patches = embeddings.patch_embeddings(frames) + positions[:, 1:]
        first = embeddings.cls_token + positions[:, :1]
        prefix = torch.cat([first, embeddings.register_tokens], dim=1)
        hidden: Tensor = torch.cat([prefix.expand(frames.shape[0], -1, -1), patches], dim=1)
        for block in self.featurizer.encoder.layer[:-1]:
            hidden = block(hidden)
        return hidden[:, prefix.shape[1] :]

    def _siglip(self, frames: Tensor) -> Tensor:
        embeddings = self.fused_featurizer.embeddings
        hidden: Tensor = embeddings.patch_embedding(frames).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding.weight
        for block in self.fused_featurizer.encoder.layers[:-1]:
            hidden = block(hidden, attention_mask=None)
        return hidden


class Projector(nn.Module):
    """PrismaticProjector of the fused backbone: three linear maps with GELU between."""

    def __init__(self, vision_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_dim, 4 * vision_dim)
        self.fc2 = nn.Linear(4 * vision_dim, hidden_dim)
        self.fc3 = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, features: Tensor) -> Tensor:
        """Map patch features to the language model's width."""
        gelu = nn.functional.gelu
        projected: Tensor = self.fc3(gelu(self.fc2(gelu(self.fc1(features)))))
        return projected


class PrismaticModule(nn.Module):
    """Towers and projector; families add a language model and a head."""

    def __init__(self, arch: PrismaticArchitecture) -> None:
        super().__init__()
        self.arch = arch
        self.vision_backbone = VisionBackbone(arch)
        vision_dim = arch.dino.hidden_size + arch.siglip.hidden_size
        self.projector = Projector(vision_dim, arch.llama.hidden_size)

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Return patch embeddings [B, images * patches, D] of pixels [B, 6 * images, S, S]."""
        patches: Tensor = self.projector(self.vision_backbone(pixel_values))
        return patches
