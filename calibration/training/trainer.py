"""The trainer of small OpenVLA-OFT policies: network, loss, averaged weights, exact resumption."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calibration.training.training_data import FrameChoice, TrainingFrames
from qvla_export.policies.oft.config import OftConfig
from qvla_export.policies.oft.module import OftModule
from qvla_export.policies.oft.new_checkpoint import new_module
from qvla_export.policies.prismatic.new_checkpoint import (
    BOS_ID,
    IMAGE_MEANS,
    IMAGE_STDS,
    STOP_ID,
    SUFFIX_ID,
    NetworkSize,
)
from qvla_export.policies.prismatic.pretrained import TOWER
from qvla_export.shared.errors import ArtifactMismatch, QvlaError

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


@dataclass(frozen=True)
class TrainingConfig:
    """Everything that decides the trained weights besides the data."""

    seed: int = 0
    steps: int = 8000
    batch_size: int = 64
    learning_rate: float = 6e-4
    weight_decay: float = 0.05
    warmup_steps: int = 300
    # Last part of training over which the learning rate falls linearly to zero.
    decay_fraction: float = 0.4
    # Share of samples whose state is replaced by zeros, so that images are needed.
    state_dropout: float = 0.2
    # Weight of predicting the frames' goals from patches and action states.
    goal_weight: float = 0.3
    # Brightness and contrast jitter, as a fraction of the full range.
    color_jitter: float = 0.15
    ema_decay: float = 0.998
    # Compute type of matrix products; bf16 is fast on CPUs with AVX512-BF16, slow elsewhere.
    precision: str = "bf16"
    save_every_steps: int = 250
    # Every how manieth frame is trained on; None for every one.
    frame_stride: int | None = None
    # The camera whose pixels are among the goals; None for none.
    goal_camera: str | None = None

    @property
    def frames(self) -> FrameChoice:
        """Which frames are read, with what to predict."""
        return FrameChoice(self.frame_stride or 1, self.goal_camera)

    def __post_init__(self) -> None:
        low = {"steps": 1, "batch_size": 1, "warmup_steps": 1, "save_every_steps": 1, "seed": 0}
        for name, least in low.items():
            if getattr(self, name) < least:
                raise QvlaError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise QvlaError(f"precision must be bf16 or fp32, got {self.precision!r}")


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


class Trainer:
    """Network, averaged weights, optimizer and step counter of one training run.

    A pretrained tower stays as it is; `features` are what it makes of every frame, float16
    [n, cameras * patches, width], see `tower_features`.

    Raises:
        QvlaError: there are fewer frames than a batch takes, or they are not of the network's size.
    """

    def __init__(
        self,
        frames: TrainingFrames,
        size: NetworkSize,
        config: TrainingConfig,
        policy: OftConfig = REFERENCE_CONFIG,
        features: Tensor | None = None,
    ) -> None:
        _require_fits(frames, size, config)
        self.frames = frames
        self._features = features
        self.size = size
        self.config = config
        self.policy = policy
        self._data = frames.digest
        self.module = new_module(size, policy, config.seed).train()
        self.averaged = new_module(size, policy, config.seed).requires_grad_(False)
        if size.pretrained is not None:
            self.module.vision_backbone.featurizer.requires_grad_(False)
        for part in (self.module.arch.dino, self.module.arch.siglip, self.module.arch.llama):
            # Torch's fused CPU attention is slower than plain products at these lengths in bf16.
            part._attn_implementation = "eager"
        self.goals = GoalHeads(size.hidden_dim, frames.goals.shape[1])
        trained = [p for p in self.module.parameters() if p.requires_grad]
        parameters = [*trained, *self.goals.parameters()]
        self.optimizer = torch.optim.AdamW(
            parameters, lr=config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.parameters = parameters
        self.step = 0

    def train_step(self) -> dict[str, float]:
        """Take one optimizer step; the batch depends only on seed and step."""
        batch = self._batch()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
            action_loss, goal_loss = self._losses(*batch)
        loss = action_loss + self.config.goal_weight * goal_loss
        loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        return {"action_l1": action_loss.item(), "goal_l1": goal_loss.item()}

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs."""
        return {
            "step": self.step,
            "identity": self._identity(),
            "module": self._trained(self.module),
            "averaged": self._trained(self.averaged),
            "goals": self.goals.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ArtifactMismatch: it was made with other settings, another network or other data.
        """
        for name, value in self._identity().items():
            saved = state["identity"].get(name)
            if saved != value:
                raise ArtifactMismatch(
                    f"the saved training has {name}={saved}, asked for {value}; "
                    "use another output folder"
                )
        self.step = int(state["step"])
        whole = self.size.pretrained is None
        self.module.load_state_dict(state["module"], strict=whole)
        self.averaged.load_state_dict(state["averaged"], strict=whole)
        self.goals.load_state_dict(state["goals"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a saved training to be continued; `steps` and decay may change."""
        settings = asdict(self.config)
        for name in ("steps", "decay_fraction", "save_every_steps"):
            settings.pop(name)
        settings |= {**asdict(self.size), "data": self._data}
        # What is None was not there in older trainings, which go on.
        return {name: value for name, value in settings.items() if value is not None}

    def _trained(self, module: OftModule) -> dict[str, Tensor]:
        """Return the weights of a network without those of a pretrained tower."""
        weights: dict[str, Tensor] = module.state_dict()
        if self.size.pretrained is None:
            return weights
        return {name: value for name, value in weights.items() if not name.startswith(TOWER)}

    def _losses(
        self,
        pixels: Tensor,
        features: Tensor | None,
        ids: Tensor,
        lengths: Tensor,
        state: Tensor,
        chunk: Tensor,
        goal: Tensor,
    ) -> tuple[Tensor, Tensor]:
        module: OftModule = self.module
        if features is None:
            seen = module.vision_backbone(pixels)
        else:
            own = module.vision_backbone.features(pixels, "siglip")
            seen = torch.cat([features.to(own.dtype), own], dim=-1)
        patches = module.projector(seen)
        embeddings = module.embed(patches, ids, state, lengths)
        hidden = module.language_model(embeddings, module.padding_mask(embeddings, ids, lengths))
        action_hidden = module.action_hidden(hidden, ids, lengths)
        actions = module.act(action_hidden).float()
        return (actions - chunk).abs().mean(), self.goals.loss(patches, action_hidden, goal)

    def _batch(self) -> tuple[Any, ...]:
        frames, config = self.frames, self.config
        per_epoch = len(frames) // config.batch_size
        epoch, position = divmod(self.step, per_epoch)
        order = torch.randperm(
            len(frames), generator=torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        )
        rows = order[position * config.batch_size : (position + 1) * config.batch_size]
        random = torch.Generator().manual_seed(config.seed * 1_000_003 + self.step)
        keep = torch.rand(len(rows), 1, generator=random) >= config.state_dropout
        prompts = frames.prompt_index[rows]
        images = _jitter(frames.images[rows], config.color_jitter, random)
        return (
            normalize_pixels(images),
            None if self._features is None else self._features[rows],
            frames.prompts[prompts],
            frames.prompt_lengths[prompts],
            frames.states[rows] * keep,
            frames.chunks[rows],
            frames.goals[rows],
        )

    def _learning_rate(self) -> float:
        config = self.config
        warmup = min(1.0, (self.step + 1) / config.warmup_steps)
        left = (config.steps - self.step) / max(1.0, config.decay_fraction * config.steps)
        return config.learning_rate * warmup * min(1.0, max(left, 0.0))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = zip(self.averaged.parameters(), self.module.parameters(), strict=True)
        trained = [(a, p.detach()) for a, p in pairs if p.requires_grad]
        averaged: list[Tensor] = [a for a, _ in trained]
        current = [p for _, p in trained]
        torch._foreach_lerp_(averaged, current, 1 - decay)


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


def _require_fits(frames: TrainingFrames, size: NetworkSize, config: TrainingConfig) -> None:
    shape = tuple(frames.images.shape[2:])
    if shape != (size.image_size, size.image_size, 3):
        raise QvlaError(
            f"the network takes images of {size.image_size} x {size.image_size} pixels, the data "
            f"set's are {shape[0]} x {shape[1]}; record or train at one size"
        )
    if len(frames) < config.batch_size:
        raise QvlaError(
            f"a batch takes {config.batch_size} frames, the data set has {len(frames)}; "
            "record more or ask for a smaller batch"
        )
