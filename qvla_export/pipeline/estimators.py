"""The comparison of all estimators on one sample of channels."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from qvla_export.pipeline import plan as stages
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.sensitivity.estimator_comparison import (
    EXACT,
    EstimatorComparison,
    add_estimator,
    new_comparison,
    time_official,
)
from qvla_export.sensitivity.estimators.base import Question
from qvla_export.sensitivity.estimators.registry import Options, find_estimator
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy

# Timed beside the official structure.
_OURS = "first-order"
_TABLES = (_OURS, "norm-product", "isotropic-noise", "hessian", "two-stage")
_CUMULATIVE = ("cumulative", "cumulative-first-order")


@dataclass(frozen=True)
class Asked:
    """What is compared on what."""

    run: RunFolder
    policy: "Policy"
    target: Target
    options: Options
    pairs: int
    # First ones of the calibration set; None for all.
    observations: int | None
    # Run folder of the episodes of cumulative estimators.
    episodes: Path | None
    seed: int

    def question(self) -> Question:
        """Return what all estimators but the cumulative ones are asked."""
        asked = stages.question(self.run, self.policy, self.target, self.seed)
        first = asked.observations[: self.observations]
        # Whole episodes may not be left.
        lengths = asked.episode_lengths if len(first) == len(asked.observations) else ()
        return replace(asked, observations=first, episode_lengths=lengths)

    def along_episodes(self) -> Question:
        """Return what cumulative estimators are asked.

        Raises:
            QvlaError: no run folder of episodes was given.
        """
        if self.episodes is None:
            raise QvlaError(
                "cumulative estimators need --episodes, a run folder made with: "
                "qvla calibrate --frames-per-episode 16"
            )
        return stages.question(RunFolder(self.episodes), self.policy, self.target, self.seed)


def compare(
    asked: Asked, methods: Sequence[str] | None, official: bool, output: Path
) -> EstimatorComparison:
    """Compare the estimators named (None for all), writing after each; go on where a run stopped.

    Raises:
        QvlaError: a method is unknown or lacks what it needs.
    """
    names = list(methods or (*_TABLES, *(_CUMULATIVE if asked.episodes else ())))
    estimators = {name: find_estimator(name, asked.options) for name in [EXACT, *names]}
    question = asked.question()
    along = asked.along_episodes() if set(names) & set(_CUMULATIVE) else None
    told: dict[str, Any] = {
        "options": asdict(asked.options),
        "episodes": None if along is None else along.calibration_digest,
    }
    compared = _kept(new_comparison(question, asked.pairs, asked.seed, told), output)
    with Progress(console=Console(stderr=True)) as progress:
        for name, estimator in estimators.items():
            if compared.of(name) is None:
                fitting = along if name in _CUMULATIVE and along is not None else question
                shown = stages.bar(progress, name)
                compared = add_estimator(compared, name, estimator, fitting, shown)
                compared.save(output)
        if official and compared.official is None:
            ours = find_estimator(_OURS, asked.options)
            shown = stages.bar(progress, "official structure")
            timed = time_official(question, _OURS, ours, shown)
            compared = replace(compared, official=timed)
            compared.save(output)
    return compared


def _kept(wanted: EstimatorComparison, output: Path) -> EstimatorComparison:
    """What a run before this one has done of the same comparison, or the one without figures."""
    kept = stages.kept_artifact(output, EstimatorComparison.load)
    # Files of before name a bound that is gone; null bounded nothing.
    options = {**wanted.asked["options"], "max_standard_error": None}
    same = (wanted.asked, {**wanted.asked, "options": options})
    return kept if kept is not None and kept.asked in same else wanted
