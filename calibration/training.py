"""Imitation training of a small OpenVLA-OFT policy from demonstrations. Resumable."""

import io
import json
import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from calibration.lerobot import LeRobotDataset
from calibration.training_data import POSITION_DIM, TrainingFrames, load_frames
from qvla_export.artifacts import versions, write_bytes, write_json
from qvla_export.errors import ArtifactError, ArtifactMismatch
from qvla_export.policies.oft_config import OftConfig
from qvla_export.policies.oft_init import (
    BOS_ID,
    STOP_ID,
    SUFFIX_ID,
    OftSize,
    new_module,
    save_checkpoint,
)
from qvla_export.policies.oft_module import OftModule

_LOG = logging.getLogger(__name__)

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
    # Weight of predicting the hand's final position from patches and action states.
    goal_weight: float = 0.3
    # Brightness and contrast jitter, as a fraction of the full range.
    color_jitter: float = 0.15
    ema_decay: float = 0.998
    # Compute type of matrix products; bf16 is fast on CPUs with AVX512-BF16, slow elsewhere.
    precision: str = "bf16"
    save_every_steps: int = 250


class GoalHeads(nn.Module):
    """Training only: predicts where the hand will end, which makes vision learn to localize."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.from_patches = nn.Linear(hidden_dim, POSITION_DIM)
        self.from_actions = nn.Linear(hidden_dim, POSITION_DIM)

    def loss(self, patches: Tensor, action_hidden: Tensor, goals: Tensor) -> Tensor:
        """Return the mean absolute error of both predictions."""
        predictions = (self.from_patches(patches.mean(1)), self.from_actions(action_hidden.mean(1)))
        return torch.stack([(p.float() - goals).abs().mean() for p in predictions]).mean()


class Trainer:
    """Network, averaged weights, optimizer and step counter of one training run."""

    def __init__(self, frames: TrainingFrames, size: OftSize, config: TrainingConfig) -> None:
        self.frames = frames
        self.config = config
        self.module = new_module(size, REFERENCE_CONFIG, config.seed).train()
        self.averaged = new_module(size, REFERENCE_CONFIG, config.seed).requires_grad_(False)
        for part in (self.module.arch.dino, self.module.arch.siglip, self.module.arch.llama):
            # Torch's fused CPU attention is slower than plain products at these lengths in bf16.
            part._attn_implementation = "eager"
        self.goals = GoalHeads(size.hidden_dim)
        parameters = [*self.module.parameters(), *self.goals.parameters()]
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
            "config": json.dumps(asdict(self.config)),
            "module": self.module.state_dict(),
            "averaged": self.averaged.state_dict(),
            "goals": self.goals.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state.

        Raises:
            ArtifactMismatch: it was made with another seed, batch size or network.
        """
        saved = json.loads(state["config"])
        for name in ("seed", "batch_size"):
            if saved[name] != getattr(self.config, name):
                raise ArtifactMismatch(
                    f"the saved training has {name}={saved[name]}, asked for "
                    f"{getattr(self.config, name)}; use another output folder"
                )
        self.step = int(state["step"])
        self.module.load_state_dict(state["module"])
        self.averaged.load_state_dict(state["averaged"])
        self.goals.load_state_dict(state["goals"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _losses(
        self,
        pixels: Tensor,
        ids: Tensor,
        lengths: Tensor,
        state: Tensor,
        chunk: Tensor,
        goal: Tensor,
    ) -> tuple[Tensor, Tensor]:
        module: OftModule = self.module
        patches = module.projector(module.vision_backbone(pixels))
        embeddings = module.embed(patches, ids, state, lengths)
        hidden = module.language_model(embeddings, module.padding_mask(embeddings, ids, lengths))
        action_hidden = module.action_hidden(hidden, ids, lengths)
        actions = module.act(action_hidden).float()
        return (actions - chunk).abs().mean(), self.goals.loss(patches, action_hidden, goal)

    def _batch(self) -> tuple[Tensor, ...]:
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
        return (
            normalize_pixels(_jitter(frames.images[rows], config.color_jitter, random)),
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
        averaged: list[Tensor] = list(self.averaged.parameters())
        current = [p.detach() for p in self.module.parameters()]
        torch._foreach_lerp_(averaged, current, 1 - decay)


def train_policy(root: Path, output: Path, size: OftSize, config: TrainingConfig, data_name: str) -> Path:
    """Train on a LeRobot data set; returns the checkpoint folder `output/checkpoint`.

    Killed and started again with the same arguments it continues from the last saved state;
    `steps` and the decay may change between runs.
    """
    output.mkdir(parents=True, exist_ok=True)
    frames = load_frames(LeRobotDataset(root), REFERENCE_CONFIG, data_name, size.vocab_size)
    trainer = Trainer(frames, size, config)
    state_path, log_path = output / "training_state.pt", output / "training_log.jsonl"
    if state_path.exists():
        trainer.load_state_dict(_load_state(state_path))
        _LOG.info("continuing at step %d", trainer.step)
    log = _read_log(log_path, trainer.step)
    started, first = time.monotonic(), trainer.step
    with Progress() as progress:
        bar = progress.add_task("training", total=config.steps, completed=trainer.step)
        while trainer.step < config.steps:
            losses = trainer.train_step()
            progress.update(bar, completed=trainer.step)
            if trainer.step % 50 == 0 or trainer.step == config.steps:
                rate = (trainer.step - first) * config.batch_size / (time.monotonic() - started)
                log.append({"step": trainer.step, **losses, "samples_per_s": round(rate, 1)})
            if trainer.step % config.save_every_steps == 0 or trainer.step == config.steps:
                _save(trainer, output, state_path, log_path, log)
    write_json(
        output / "training.json",
        {
            "config": asdict(config),
            "size": asdict(size),
            "frames": len(frames),
            "episodes": frames.statistics[data_name]["num_trajectories"],
            "versions": versions(),
        },
    )
    return output / "checkpoint"


def normalize_pixels(images: Tensor) -> Tensor:
    """Return both towers' inputs [B, 6, S, S] of float or uint8 frames [B, S, S, 3], 0..255."""
    scaled = images.permute(0, 3, 1, 2).float() / 255
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    std = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
    return torch.cat([(scaled - mean) / std, (scaled - 0.5) / 0.5], dim=1)


def _jitter(images: Tensor, amount: float, random: torch.Generator) -> Tensor:
    shape = (len(images), 1, 1, 1)
    contrast = 1 + amount * (2 * torch.rand(shape, generator=random) - 1)
    brightness = 255 * amount * (2 * torch.rand(shape, generator=random) - 1)
    centered = (images.float() - 127.5) * contrast + 127.5 + brightness
    return centered.clamp(0, 255).round()


def _save(
    trainer: Trainer, output: Path, state_path: Path, log_path: Path, log: list[dict[str, float]]
) -> None:
    buffer = io.BytesIO()
    torch.save(trainer.state_dict(), buffer)
    write_bytes(log_path, "".join(json.dumps(row) + "\n" for row in log).encode())
    write_bytes(state_path, buffer.getvalue())
    save_checkpoint(
        output / "checkpoint",
        trainer.averaged,
        REFERENCE_CONFIG,
        trainer.frames.tokenizer,
        trainer.frames.statistics,
        trainer.step,
    )


def _load_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for damaged files
        raise ArtifactError(f"{path} cannot be resumed from: {error}; remove it") from error
    return state


def _read_log(path: Path, step: int) -> list[dict[str, float]]:
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [row for row in rows if row["step"] <= step]
