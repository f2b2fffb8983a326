"""Sensitivities in closed loop: how far one channel at one width takes the hand from its way.

The paper cross-validates ranks "with short environmental rollouts" (section 4.1); here they stand
beside the other estimators of `qvla estimators`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.policies.layers import replaced_weights, traced_layers, weight_rows
from qvla_export.sensitivity.estimators.base import QUIETLY, ChannelWidth, Question, Work
from qvla_export.sensitivity.estimators.exact import changed_rows
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.action import following
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from calibration.benchmarks.metaworld.simulator import Simulator
    from qvla_export.shared.action import ActionPolicy


@dataclass(frozen=True)
class ShortRollouts:
    """The first steps of some episodes, once in float and once with each pair's weights."""

    # Names of the simulator's tasks.
    tasks: tuple[str, ...]
    # Of each task, with seeds from 0.
    episodes: int = 2
    # Chunks that are executed to their end, or as far as the task goes.
    looks: int = 3

    @property
    def method(self) -> str:
        """Return what is recorded: "rollouts"."""
        return "rollouts"

    @property
    def exact_share(self) -> float:
        """Return 1: every pair is measured by itself."""
        return 1.0

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return the episodes."""
        return {"tasks": list(self.tasks), "episodes": self.episodes, "looks": self.looks}

    def table(self, question: Question, work: Work = QUIETLY) -> Sensitivities:
        """Refuse: every pair takes an episode.

        Raises:
            QvlaError: always.
        """
        raise QvlaError(
            "short rollouts rank sampled pairs, they make no table; see qvla estimators"
        )

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = QUIETLY
    ) -> NDArray[np.float64]:
        """Return the squared distance of the hand from float's way, mean over steps and episodes.

        The question's observations are not looked at: the policy sees the simulator. A killed
        measurement begins anew.

        Raises:
            QvlaError: a task is unknown, or the policy does not act in the simulator.
        """
        from calibration.benchmarks.metaworld.simulator import Simulator
        from calibration.benchmarks.metaworld.tasks import find_task

        policy = question.policy
        layers = traced_layers(policy)
        errors = changed_rows(layers, pairs, question)
        sums, done = np.zeros(len(pairs)), 0
        for task in self.tasks:
            with Simulator(find_task(task)) as simulator:
                for seed in range(self.episodes):
                    way = self._way(simulator, policy, seed)
                    for number, (pair, error) in enumerate(zip(pairs, errors, strict=True)):
                        rows = weight_rows(layers[pair.layer]).copy()
                        rows[pair.channel] += error.numpy()
                        with replaced_weights(layers, {pair.layer: rows}):
                            other = self._way(simulator, policy, seed)
                        both = min(len(way), len(other))
                        apart = np.square(other[:both] - way[:both]).sum(axis=1)
                        sums[number] += apart.mean()
                        done += 1
                        if work.on_progress is not None:
                            work.on_progress(done, len(pairs) * len(self.tasks) * self.episodes)
        return sums / (len(self.tasks) * self.episodes)

    def _way(
        self, simulator: "Simulator", policy: "ActionPolicy", seed: int
    ) -> NDArray[np.float64]:
        """Return where the hand is after each step, metres.  float64 [steps, 3]"""
        seen, hands = simulator.reset(seed), []
        for _ in range(self.looks):
            chunk = policy.infer(seen)
            for action in chunk.actions:
                if simulator.done:
                    break
                simulator.step(action)
                hands.append(simulator.hand)
            seen = following(simulator.observe(), chunk)
        return np.stack(hands)
