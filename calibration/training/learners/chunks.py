"""Training of a policy that puts a chunk out at once: ACT."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibration.training.demonstrated_frames import DemonstratedFrames
from calibration.training.learners.lerobot_tables import feature_tables, picture_table
from qvla_export.policies.act import new_checkpoint as act
from qvla_export.policies.act.module import ActModule
from qvla_export.policies.act.policy import ActPolicy
from qvla_export.policies.base import PolicyBatch
from qvla_export.policies.lerobot.new_checkpoint import Features


@dataclass(frozen=True)
class ActLearner:
    """ACT: the mean absolute error of the chunk, without the encoder of demonstrated actions.

    The latent, which upstream trains with that encoder, is zero throughout, as where it acts.
    """

    camera: str
    size: act.ActSize

    @property
    def horizon(self) -> int:
        """Return the actions of a chunk."""
        return self.size.horizon

    def description(self) -> Mapping[str, Any]:
        """Return what decides the network."""
        return {"family": "act", **asdict(self)}

    def new_module(self, demonstrations: DemonstratedFrames, seed: int) -> ActModule:
        """Return a network to begin with."""
        return act.new_module(self.size, self._features(demonstrations), seed)

    def write(self, folder: Path, module: nn.Module, demonstrations: DemonstratedFrames) -> None:
        """Write a network as a checkpoint folder in LeRobot's layout, atomically."""
        assert isinstance(module, ActModule)
        tables = {**feature_tables(demonstrations), **picture_table(demonstrations)}
        act.save_checkpoint(folder, module, self._features(demonstrations), tables)

    def losses(
        self, policy: ActPolicy, batch: PolicyBatch, chunks: Tensor, random: torch.Generator
    ) -> Mapping[str, Tensor]:
        """Return the mean absolute error."""
        return {"action_l1": (policy.normalized_actions(batch) - chunks).abs().mean()}

    def _features(self, demonstrations: DemonstratedFrames) -> Features:
        height, width = demonstrations.images.shape[1:3]
        modes = dict.fromkeys(("VISUAL", "STATE", "ACTION"), "MEAN_STD")
        return Features(
            {self.camera: (height, width)},
            demonstrations.state_dim,
            demonstrations.action_dim,
            modes,
        )
