"""The protocol `Learner`: what a family does in training, beside what its policies do anyway."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from calibration.training.demonstrated_frames import DemonstratedFrames
from qvla_export.policies.base import PolicyBatch


class Learner(Protocol):
    """A new network of one family, its loss, and its checkpoint.

    Preprocessing is none of its matter: a checkpoint is written before the first step and opened,
    and its policy's own processor feeds the network in training as it does on a robot.
    """

    @property
    def camera(self) -> str:
        """Name of the pictures that are seen."""
        ...

    @property
    def horizon(self) -> int:
        """Actions of a chunk."""
        ...

    def description(self) -> Mapping[str, Any]:
        """Return what decides the network, for `training.json`."""
        ...

    def new_module(self, demonstrations: DemonstratedFrames, seed: int) -> nn.Module:
        """Return a network to begin with."""
        ...

    def write(self, folder: Path, module: nn.Module, demonstrations: DemonstratedFrames) -> None:
        """Write a network as a checkpoint folder in the family's layout, atomically."""
        ...

    def losses(
        self, policy: Any, batch: PolicyBatch, chunks: Tensor, random: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return what is minimized, by name.

        Args:
            policy: of this family; its `module` is what is trained.
            batch: what it sees.
            chunks: what was done, normalized as the policy's actions are.  [B, horizon, dim]
            random: decides everything that is drawn.
        """
        ...
