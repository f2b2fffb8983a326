"""The trainer of small OpenVLA-OFT policies: network and losses."""

from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from calibration.training.base_trainer import BaseTrainer, TrainingConfig
from calibration.training.training_data import TrainingFrames
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.oft.new_checkpoint import new_module, save_checkpoint
from qvla_export.policies.prismatic.new_checkpoint import (
    BOS_ID,
    IMAGE_MEANS,
    IMAGE_STDS,
    STOP_ID,
    SUFFIX_ID,
    NetworkSize,
)
from qvla_export.policies.prismatic.pretrained import TOWER
from qvla_export.shared.errors import QvlaError

REFERENCE_CONFIG = OftConfig(
    cameras=("image",),
    horizon=8,
    action_dim=4,
    state_dim=4,
    normalization="q99",
    vision_heads=(2, 2),
    bos_token_id=BOS_ID,
    stop_token_id=STOP_ID,
    suffix_token_id=SUFFIX_ID,
)


class GoalHeads(nn.Module):
    """Training only: predicts where the hand will end, which makes vision learn to localize.

    Where a camera says where things are, also that.
    """

    def __init__(self, hidden_dim: int, goal_dim: int) -> None:
        super().__init__()
        self.from_patches = nn.Linear(hidden_dim, goal_dim)
        self.from_actions = nn.Linear(hidden_dim, goal_dim)

    def loss(self, patches: Tensor, action_hidden: Tensor, goals: Tensor) -> Tensor:
        """Return the mean absolute error of both predictions."""
        predictions = (self.from_patches(patches.mean(1)), self.from_actions(action_hidden.mean(1)))
        return torch.stack([(p.float() - goals).abs().mean() for p in predictions]).mean()


class Trainer(BaseTrainer):
    """The training of an OpenVLA-OFT policy.

    A pretrained tower stays as it is; `features` are what it makes of every frame, float16
    [n, cameras * patches, width], see `tower_features`.

    Raises:
        QvlaError: there are fewer frames than a batch takes, or they are not of the network's size.
    """

    module: OftModule
    averaged: OftModule
    goals: GoalHeads

    def __init__(
        self,
        frames: TrainingFrames,
        size: NetworkSize,
        config: TrainingConfig,
        policy: OftConfig = REFERENCE_CONFIG,
        features: Tensor | None = None,
    ) -> None:
        _require_fits(frames, size)
        self.frames = frames
        self.size = size
        self.policy = policy
        self._features = features
        self.weights = {"goal_l1": config.goal_weight}
        module = new_module(size, policy, config.seed).train()
        if size.pretrained is not None:
            module.vision_backbone.featurizer.requires_grad_(False)
        for part in (module.arch.dino, module.arch.siglip, module.arch.llama):
            # Torch's fused CPU attention is slower than plain products at these lengths in bf16.
            part._attn_implementation = "eager"
        goals = GoalHeads(size.hidden_dim, frames.goals.shape[1])
        identity = {**asdict(size), "data": frames.digest}
        super().__init__(module, goals, config, len(frames), identity)
        if config.compiled:
            for network in (module.projector, module.language_model):
                network.compile(dynamic=False)

    def losses(self, rows: Tensor, random: torch.Generator) -> dict[str, Tensor]:
        """Return the mean absolute errors of the actions and of the goals."""
        module, frames, config = self.module, self.frames, self.config
        state_mask = torch.rand(len(rows), 1, generator=random) >= config.state_dropout
        pixels = normalize_pixels(_jitter(frames.images[rows], config.color_jitter, random))
        prompts = frames.prompt_index[rows]
        ids, lengths = frames.prompts[prompts], frames.prompt_lengths[prompts]
        patches = module.projector(self._features_of(pixels, rows))
        embeddings = module.embed(patches, ids, frames.states[rows] * state_mask, lengths)
        hidden = module.language_model(embeddings, module.padding_mask(embeddings, ids, lengths))
        action_hidden = module.action_hidden(hidden, ids, lengths)
        actions = module.act(action_hidden).float()
        return {
            "action_l1": (actions - frames.chunks[rows]).abs().mean(),
            "goal_l1": self.goals.loss(patches, action_hidden, frames.goals[rows]),
        }

    def save(self, checkpoint: Path) -> None:
        """Write the averaged weights as a checkpoint folder, atomically."""
        save_checkpoint(
            checkpoint,
            self.averaged,
            self.policy,
            self.frames.tokenizer,
            self.frames.statistics,
            self.step,
            self.size.pretrained,
        )

    def trained_weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the weights of a network without those of a pretrained tower."""
        weights = super().trained_weights(network)
        if self.size.pretrained is None:
            return weights
        return {name: value for name, value in weights.items() if not name.startswith(TOWER)}

    def _features_of(self, pixels: Tensor, rows: Tensor) -> Tensor:
        """Return what both towers make of pixels."""
        towers = self.module.vision_backbone
        if self._features is None:
            both: Tensor = towers(pixels)
            return both
        own = towers.features(pixels, "siglip")
        return torch.cat([self._features[rows].to(own.dtype), own], dim=-1)


def normalize_pixels(images: Tensor) -> Tensor:
    """Return both towers' inputs [B, 6 * cameras, S, S] of frames, float or uint8, 0..255.

    Args:
        images: [B, cameras, S, S, 3]
    """
    scaled = images.permute(0, 1, 4, 2, 3).float() / 255
    towers = zip(IMAGE_MEANS, IMAGE_STDS, strict=True)
    inputs = [
        (scaled - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        for mean, std in towers
    ]
    return torch.cat(inputs, dim=2).flatten(1, 2)


def _jitter(images: Tensor, amount: float, random: torch.Generator) -> Tensor:
    shape = (len(images), 1, 1, 1, 1)
    contrast = 1 + amount * (2 * torch.rand(shape, generator=random) - 1)
    brightness = 255 * amount * (2 * torch.rand(shape, generator=random) - 1)
    centered = (images.float() - 127.5) * contrast + 127.5 + brightness
    return centered.clamp(0, 255).round()


def _require_fits(frames: TrainingFrames, size: NetworkSize) -> None:
    shape = tuple(frames.images.shape[2:])
    if shape != (size.image_size, size.image_size, 3):
        raise QvlaError(
            f"the network takes images of {size.image_size} x {size.image_size} pixels, the data "
            f"set's are {shape[0]} x {shape[1]}; record or train at one size"
        )
