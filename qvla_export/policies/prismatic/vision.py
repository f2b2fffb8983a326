"""The two vision towers and the projector on `transformers` modules.

Source: `modeling_prismatic.py` of openvla and openvla-oft. Parameter names are the upstream ones
wherever `transformers` has no module of its own.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersModel, SiglipVisionModel

from qvla_export.policies.prismatic.architecture import PrismaticArchitecture

Tower = Literal["dino", "siglip"]
# (tower, block, hidden states between its attention and its MLP) -> what goes on in their place.
Modulation = Callable[[Tower, int, Tensor], Tensor]


class VisionBackbone(nn.Module):
    """Both towers up to their second-to-last block, features side by side."""

    def __init__(self, arch: PrismaticArchitecture) -> None:
        super().__init__()
        self.featurizer = Dinov2WithRegistersModel(arch.dino)
        self.fused_featurizer = SiglipVisionModel(arch.siglip)

    def forward(self, pixel_values: Tensor, modulate: Modulation | None = None) -> Tensor:
        """Return patch features [B, images * patches, dino + siglip] of [B, 6 * images, S, S]."""
        dino = self.features(pixel_values, "dino", modulate)
        return torch.cat([dino, self.features(pixel_values, "siglip", modulate)], dim=-1)

    def features(
        self, pixel_values: Tensor, tower: Tower, modulate: Modulation | None = None
    ) -> Tensor:
        """Return one tower's features [B, images * patches, width] of [B, 6 * images, S, S]."""
        batch, channels, height, width = pixel_values.shape
        frames = pixel_values.reshape(batch * (channels // 6), 6, height, width)
        if tower == "dino":
            found = self._dino(frames[:, :3], modulate)
        else:
            found = self._siglip(frames[:, 3:], modulate)
        return found.reshape(batch, -1, found.shape[-1])

    def _dino(self, frames: Tensor, modulate: Modulation | None) -> Tensor:
        embeddings = self.featurizer.embeddings
        positions = embeddings.position_embeddings
        patches = embeddings.patch_embeddings(frames) + positions[:, 1:]
        first = embeddings.cls_token + positions[:, :1]
        prefix = torch.cat([first, embeddings.register_tokens], dim=1)
        hidden: Tensor = torch.cat([prefix.expand(frames.shape[0], -1, -1), patches], dim=1)
        for index, block in enumerate(self.featurizer.encoder.layer[:-1]):
            if modulate is None:
                hidden = block(hidden)
            else:
                hidden = _dino_mlp(block, modulate("dino", index, _dino_attention(block, hidden)))
        return hidden[:, prefix.shape[1] :]

    def _siglip(self, frames: Tensor, modulate: Modulation | None) -> Tensor:
        embeddings = self.fused_featurizer.embeddings
        hidden: Tensor = embeddings.patch_embedding(frames).flatten(2).transpose(1, 2)
        hidden = hidden + embeddings.position_embedding.weight
        for index, block in enumerate(self.fused_featurizer.encoder.layers[:-1]):
            if modulate is None:
                hidden = block(hidden, attention_mask=None)
            else:
                attended = _siglip_attention(block, hidden)
                hidden = _siglip_mlp(block, modulate("siglip", index, attended))
        return hidden


# Halves of transformers' blocks, which are one function there.  Any: their parts have no types.
def _dino_attention(block: Any, hidden: Tensor) -> Tensor:
    mixed, _ = block.attention(block.norm1(hidden))
    attended: Tensor = hidden + block.layer_scale1(mixed)
    return attended


def _dino_mlp(block: Any, hidden: Tensor) -> Tensor:
    mapped: Tensor = hidden + block.layer_scale2(block.mlp(block.norm2(hidden)))
    return mapped


def _siglip_attention(block: Any, hidden: Tensor) -> Tensor:
    mixed, _ = block.self_attn(block.layer_norm1(hidden), attention_mask=None)
    attended: Tensor = hidden + mixed
    return attended


def _siglip_mlp(block: Any, hidden: Tensor) -> Tensor:
    mapped: Tensor = hidden + block.mlp(block.layer_norm2(hidden))
    return mapped


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

    def patches(self, pixel_values: Tensor, modulate: Modulation | None = None) -> Tensor:
        """Return patch embeddings [B, images * patches, D] of pixels [B, 6 * images, S, S]."""
        patches: Tensor = self.projector(self.vision_backbone(pixel_values, modulate))
        return patches
