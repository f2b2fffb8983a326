"""The `Policy` of a vision tower: class token and patches in, features of all of them out."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from qvla_export.policies.backbones.output_policy import OutputPolicy, output_statistics
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.prismatic.pretrained import PretrainedTower, TowerChoice, tower_key
from qvla_export.shared.images import ImageSpec
from qvla_export.shared.processor import Processor, ProcessorSpec

# Of ImageNet's pictures, which DINOv2 was trained with.
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_EPSILON = 1e-6


class PictureNetwork(nn.Module):
    """A DINOv2 tower with its last norm."""

    def __init__(self, config: Dinov2WithRegistersConfig) -> None:
        super().__init__()
        self.featurizer = Dinov2WithRegistersModel(config)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return features [B, 1 + patches, width] of normalized pictures [B, 3, S, S]."""
        embeddings = self.featurizer.embeddings
        positions = embeddings.position_embeddings
        patches = embeddings.patch_embeddings(pixel_values) + positions[:, 1:]
        first = (embeddings.cls_token + positions[:, :1]).expand(len(patches), -1, -1)
        hidden: Tensor = torch.cat([first, patches], dim=1)
        for block in self.featurizer.encoder.layer:
            hidden = block(hidden)
        features: Tensor = self.featurizer.layernorm(hidden)
        return features


@dataclass(frozen=True, repr=False)
class PicturePolicy(OutputPolicy):
    """A vision tower; see `Policy` for the meaning of its members."""

    module: PictureNetwork

    def normalized_actions(self, batch: PolicyBatch) -> Tensor:
        """Return features [B, 1 + patches, width]."""
        features: Tensor = self.module(batch.pixel_values)
        return features


def picture_policy(tower: PretrainedTower, camera: str, size: int, digest: str) -> PicturePolicy:
    """Return a tower as a policy.

    Args:
        tower: whose weights.
        camera: whose pictures.
        size: side of a picture, pixels; positions are resampled to it.
        digest: of the policy.

    Raises:
        CheckpointError: as `PackageFile.path`.
    """
    choice = TowerChoice(tower, tower.blocks)
    stored = {tower_key(n): t for n, t in (choice.tensors() | choice.own_tensors(size)).items()}
    config = Dinov2WithRegistersConfig(
        hidden_size=tower.width,
        num_hidden_layers=tower.blocks,
        num_attention_heads=tower.heads,
        mlp_ratio=len(stored["encoder.layer.0.mlp.fc1.bias"]) // tower.width,
        image_size=size,
        patch_size=tower.patch,
        num_register_tokens=0,
        layer_norm_eps=_EPSILON,
        hidden_act="gelu",
    )
    config._attn_implementation = "sdpa"
    network = PictureNetwork(config).eval()
    # The mask token is for training alone.
    unused = {"embeddings.mask_token": torch.zeros_like(network.featurizer.embeddings.mask_token)}
    network.featurizer.load_state_dict(stored | unused)
    network.requires_grad_(False)
    spec = ProcessorSpec(
        cameras=(camera,),
        image=ImageSpec(size, "resize-naive", (_MEANS,), (_DEVIATIONS,)),
        horizon=1 + (size // tower.patch) ** 2,
        action_dim=tower.width,
        state_dim=0,
        language="none",
    )
    return PicturePolicy(network, Processor(spec, output_statistics(tower.width)), digest)
