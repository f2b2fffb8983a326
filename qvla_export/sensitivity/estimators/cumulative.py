"""Cumulative sensitivities (eq. 5): squared deviations summed along episodes.

Both policies see the reference's observations at every step, as eq. 5 is printed: what the changed
policy would have seen after its own actions needs a simulator and a rollout a channel.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.sensitivity.estimators.base import QUIETLY, ChannelWidth, Estimator, Question, Work
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError


@dataclass(frozen=True)
class Cumulative:
    """Mean over episodes of the sum over their steps, with each step's deviation as `step` has it.

    The sum over all steps of all episodes is the mean over observations times their number.
    """

    step: Estimator

    @property
    def method(self) -> str:
        """Return the name that is recorded."""
        return f"cumulative, {self.step.method}"

    @property
    def settings(self) -> Mapping[str, Any]:
        """Return those of a step."""
        return self.step.settings

    @property
    def exact_share(self) -> float:
        """Return that of a step."""
        return self.step.exact_share

    def table(self, question: Question, work: Work = QUIETLY) -> Sensitivities:
        """Estimate every channel at every width."""
        steps = np.float32(_steps_per_episode(question))
        single = self.step.table(question, work)
        values = {name: found * steps for name, found in single.values.items()}
        return replace(single, values=values, method=self.method)

    def of_pairs(
        self, question: Question, pairs: Sequence[ChannelWidth], work: Work = QUIETLY
    ) -> NDArray[np.float64]:
        """Estimate some pairs.  float64 [pairs]"""
        steps = _steps_per_episode(question)
        return self.step.of_pairs(question, pairs, work) * steps


def _steps_per_episode(question: Question) -> float:
    lengths = question.episode_lengths
    if not lengths:
        raise QvlaError(
            "cumulative sensitivities need to know the episodes of the observations; draw some "
            "that follow each other: qvla calibrate --frames-per-episode 16"
        )
    return sum(lengths) / len(lengths)
