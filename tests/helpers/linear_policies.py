"""Policies that are linear in every weight, and what several tests of estimators share."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from qvla_export.policies.base import PolicyBatch
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule
from qvla_export.sensitivity.estimators.base import Estimator, Question, Work
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.observation import Observation

PICTURE = {"image": np.zeros((2, 2, 3), np.uint8)}
QUANTIZER = QuantizerSpec({bits: WidthRule() for bits in (2, 4, 8)})


class LinearNetwork(torch.nn.Module):
    """Tokens go through two linear layers and are summed: actions are linear in every weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(6, 5)
        self.second = torch.nn.Linear(5, 3, bias=False)
        self.requires_grad_(False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(tokens)).sum(dim=1, keepdim=True)


@dataclass(frozen=True)
class LinearPolicy:
    """Actions of a linear network on the observations' states, as tokens of six numbers."""

    module: LinearNetwork
    digest: str = "linear"

    def batch(self, observations: list[Observation]) -> PolicyBatch:
        states = torch.from_numpy(np.stack([o.state for o in observations]))
        return PolicyBatch(states.reshape(len(states), -1, 6), states.long(), None, states)

    def normalized_actions(self, batch: PolicyBatch) -> torch.Tensor:
        return self.module(batch.pixel_values)

    def layers(self) -> dict[str, torch.nn.Linear]:
        return {"first": self.module.first, "second": self.module.second}


def linear_question(count: int, episode_lengths: tuple[int, ...] = ()) -> Question:
    """Observations of four tokens, three at a time."""
    random = np.random.default_rng(1)
    observations = [
        Observation(PICTURE, "move", random.normal(size=24).astype(np.float32) * (1 + i % 3))
        for i in range(count)
    ]
    policy = LinearPolicy(LinearNetwork())
    return Question(
        policy, observations, "c", QUANTIZER, episode_lengths=episode_lengths, batch_size=3
    )


def flat(table: Sensitivities) -> np.ndarray:
    return np.concatenate([values.ravel() for values in table.values.values()])


def interrupted_until_done(
    estimator: Estimator, question: Question, journal: Path
) -> tuple[Sensitivities, int]:
    """Stop the n-th attempt at its n-th sign of progress; return how many were stopped."""
    for attempt in range(1, 100):
        left = [attempt]

        def stop(done: int, total: int, left: list[int] = left) -> None:
            assert 0 < done <= total
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        try:
            return estimator.table(question, Work(journal, stop)), attempt - 1
        except KeyboardInterrupt:
            assert list(journal.parent.iterdir()) or attempt == 1 or "Hessian" in estimator.method
    raise AssertionError("it never ends")
