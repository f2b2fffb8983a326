"""What every training does: steps of an optimizer, averaged weights, exact resumption."""

import abc
import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from calibration.training.training_data import FrameChoice
from qvla_export.shared.errors import ArtifactMismatch, QvlaError


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
    # Whether torch compiles the network first: a minute and a C++ compiler for steps that are about
    # a third shorter; equal but for rounding.
    compiled: bool = False
    save_every_steps: int = 250
    # One frame in so many is trained on; None for all.
    frame_stride: int | None = None
    # The camera whose pixels are among the goals; None for none.
    goal_camera: str | None = None

    @property
    def frames(self) -> FrameChoice:
        """Which frames are read, with what to predict."""
        return FrameChoice(self.frame_stride or 1, self.goal_camera)

    def __post_init__(self) -> None:
        limits = {"steps": 1, "batch_size": 1, "warmup_steps": 1, "save_every_steps": 1, "seed": 0}
        for name, least in limits.items():
            if getattr(self, name) < least:
                raise QvlaError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if self.precision not in ("bf16", "fp32"):
            raise QvlaError(f"precision must be bf16 or fp32, got {self.precision!r}")


class BaseTrainer(abc.ABC):
    """Network, averaged weights, optimizer and step counter of one training run.

    Raises:
        QvlaError: there are fewer frames than a batch takes.
    """

    # Of losses that do not weigh 1.
    weights: Mapping[str, float] = MappingProxyType({})

    def __init__(
        self,
        module: nn.Module,
        goals: nn.Module,
        config: TrainingConfig,
        frames: int,
        identity: Mapping[str, Any],
    ) -> None:
        """Begin a training at step 0.

        Args:
            module: the network, as it begins.
            goals: what predicts goals beside it, and is left out of the policy.
            config: how it is trained.
            frames: how many there are to draw a batch from.
            identity: what must be equal, beside the configuration, for a training to be continued.
        """
        if frames < config.batch_size:
            raise QvlaError(
                f"a batch takes {config.batch_size} frames, the data set has {frames}; "
                "record more or ask for a smaller batch"
            )
        self.config = config
        self.module = module
        self.averaged = copy.deepcopy(module).requires_grad_(False)
        self.goals = goals
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        self.parameters = [*weights, *goals.parameters()]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
        )
        self.step = 0
        self._frames = frames
        self._own_identity = dict(identity)

    @abc.abstractmethod
    def losses(self, rows: Tensor, random: torch.Generator) -> Mapping[str, Tensor]:
        """Return what is minimized on a batch, by name.

        Args:
            rows: numbers of the frames.  int64 [B]
            random: decides everything that is drawn for this batch.
        """

    @abc.abstractmethod
    def save(self, checkpoint: Path) -> None:
        """Write the averaged weights as a checkpoint folder, atomically."""

    def train_step(self) -> dict[str, float]:
        """Take one step and return its losses; the batch depends on seed and step alone."""
        rows = self._rows()
        random = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses = self.losses(rows, random)
            terms = [self.weights.get(name, 1.0) * loss for name, loss in losses.items()]
        torch.autograd.backward(torch.stack(terms).sum())
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._average()
        return {name: loss.item() for name, loss in losses.items()}

    def trained_weights(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the weights of the network, or of its average, that a training changes."""
        weights: dict[str, Tensor] = network.state_dict()
        return weights

    def state_dict(self) -> dict[str, Any]:
        """Return everything that resuming needs."""
        return {
            "step": self.step,
            "identity": self._identity(),
            "module": self.trained_weights(self.module),
            "averaged": self.trained_weights(self.averaged),
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
        for network, name in ((self.module, "module"), (self.averaged, "averaged")):
            whole = len(self.trained_weights(network)) == len(network.state_dict())
            network.load_state_dict(state[name], strict=whole)
        self.goals.load_state_dict(state["goals"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _identity(self) -> dict[str, Any]:
        """What must be equal for a saved training to be continued; how long it is may change."""
        settings = asdict(self.config)
        for name in ("steps", "decay_fraction", "save_every_steps", "compiled"):
            settings.pop(name)
        # What is None was not there in older trainings, which go on.
        identity = {**settings, **self._own_identity}
        return {name: value for name, value in identity.items() if value is not None}

    def _rows(self) -> Tensor:
        config = self.config
        epoch, position = divmod(self.step, self._frames // config.batch_size)
        order = torch.randperm(
            self._frames, generator=torch.Generator().manual_seed(config.seed * 100_003 + epoch)
        )
        return order[position * config.batch_size : (position + 1) * config.batch_size]

    def _learning_rate(self) -> float:
        config = self.config
        warmup = min(1.0, (self.step + 1) / config.warmup_steps)
        left = (config.steps - self.step) / max(1.0, config.decay_fraction * config.steps)
        return config.learning_rate * warmup * min(1.0, max(left, 0.0))

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = zip(self.averaged.parameters(), self.module.parameters(), strict=True)
        weights = [(average, weight) for average, weight in pairs if weight.requires_grad]
        averages: list[Tensor] = [average for average, _ in weights]
        current = [weight.detach() for _, weight in weights]
        torch._foreach_lerp_(averages, current, 1 - decay)
