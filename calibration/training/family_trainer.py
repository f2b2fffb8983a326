"""The trainer of a policy of any family: its processor feeds it, its learner tells the loss."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from calibration.training.base_trainer import BaseTrainer, TrainingConfig
from calibration.training.demonstrated_frames import DemonstratedFrames
from calibration.training.learner import Learner
from qvla_export.policies.base import Policy
from qvla_export.policies.families import load_policy


class FamilyTrainer(BaseTrainer):
    """The training of a policy that a `Learner` begins."""

    def __init__(
        self, demonstrations: DemonstratedFrames, learner: Learner, config: TrainingConfig
    ) -> None:
        """Begin a training at step 0.

        Raises:
            QvlaError: the demonstrations do not fit the policy, or are fewer than a batch.
        """
        self.learner = learner
        self.demonstrations = demonstrations
        self.policy = _new_policy(learner, demonstrations, config.seed)
        chunks = self.policy.processor.statistics.action.normalize(
            demonstrations.chunks(learner.horizon)
        )
        self._chunks = torch.from_numpy(chunks)
        module = self.policy.module.train().requires_grad_(True)
        identity = {"learner": dict(learner.description()), "data": demonstrations.digest}
        super().__init__(module, nn.ModuleList(), config, len(demonstrations), identity)

    def losses(self, rows: Tensor, random: torch.Generator) -> Mapping[str, Tensor]:
        """Return the family's losses on frames, some of them without their state."""
        batch = self.policy.inputs([self.demonstrations.observation(int(row)) for row in rows])
        if batch.state is not None:
            mask = torch.rand(len(rows), 1, generator=random) >= self.config.state_dropout
            batch = replace(batch, state=batch.state * mask)
        return self.learner.losses(self.policy, batch, self._chunks[rows], random)

    def save(self, checkpoint: Path) -> None:
        """Write the averaged weights as a checkpoint folder, atomically."""
        self.learner.write(checkpoint, self.averaged, self.demonstrations)


def _new_policy(learner: Learner, demonstrations: DemonstratedFrames, seed: int) -> Policy:
    """Return a new policy by way of its checkpoint, which makes its processor."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "new"
        learner.write(folder, learner.new_module(demonstrations, seed), demonstrations)
        return load_policy(folder)
