"""The step that compares all estimators of sensitivities on one sample of channels."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.deployment.short_rollouts import ShortRollouts
from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.sensitivities import new_question
from qvla_export.sensitivity.estimator_comparison import (
    EXACT,
    EstimatorComparison,
    add_estimator,
    new_comparison,
    time_official,
)
from qvla_export.sensitivity.estimators.base import Estimator, Question
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
class EstimatorRequest:
    """Which estimators are compared, on what."""

    run: RunFolder
    policy: "Policy"
    target: Target
    options: Options
    # Names, beside the exact one; None for all.
    methods: tuple[str, ...] | None = None
    # (channel, width) pairs, at least so many of every layer at every width.
    pairs: int = 2000
    # First ones of the calibration set; None for all.
    observations: int | None = None
    # Run folder of the episodes of cumulative estimators.
    episodes: Path | None = None
    # The simulator's tasks whose first steps rank the pairs too; none where empty.
    rollouts: tuple[str, ...] = ()
    # Whether the official procedure's structure is timed as well.
    official: bool = True
    seed: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the estimators, the exact one first."""
        cumulative = _CUMULATIVE if self.episodes else ()
        rollouts = ("rollouts",) if self.rollouts else ()
        return (EXACT, *(self.methods or (*_TABLES, *cumulative)), *rollouts)

    def estimator(self, name: str) -> Estimator:
        """Return an estimator by its name.

        Raises:
            QvlaError: there is none of this name, or an option is out of range.
        """
        closed = ShortRollouts(self.rollouts)
        return closed if name == closed.method else find_estimator(name, self.options)

    def question(self) -> Question:
        """Return what is put to all estimators but the cumulative ones.

        Raises:
            ArtifactError: the run has no calibration set.
        """
        whole = new_question(self.run, self.policy, self.target, self.seed)
        first = whole.observations[: self.observations]
        # Whole episodes may not be left.
        lengths = whole.episode_lengths if len(first) == len(whole.observations) else ()
        return replace(whole, observations=first, episode_lengths=lengths)

    def question_along_episodes(self) -> Question:
        """Return what is put to cumulative estimators.

        Raises:
            QvlaError: no run folder of episodes was given.
        """
        if self.episodes is None:
            raise QvlaError(
                "cumulative estimators need --episodes, a run folder made with: "
                "qvla calibrate --frames-per-episode 16"
            )
        return new_question(RunFolder(self.episodes), self.policy, self.target, self.seed)


def compare_estimators(
    request: EstimatorRequest, output: Path, on_progress: OnProgress = ignore
) -> EstimatorComparison:
    """Compare estimators, writing after each; an interrupted comparison goes on.

    Raises:
        QvlaError: a method is unknown or lacks what it needs.
    """
    estimators = {name: request.estimator(name) for name in request.names}
    single = request.question()
    along = request.question_along_episodes() if {*request.names} & {*_CUMULATIVE} else None
    identity: dict[str, Any] = {
        "options": asdict(request.options),
        "episodes": None if along is None else along.calibration_digest,
        **({"rollouts": list(request.rollouts)} if request.rollouts else {}),
    }
    empty = new_comparison(single, request.pairs, request.seed, identity)
    comparison = _load_same(empty, output)
    for name, estimator in estimators.items():
        if comparison.of(name) is None:
            fitting = along if name in _CUMULATIVE and along is not None else single
            tell = bar(on_progress, name)
            comparison = add_estimator(comparison, name, estimator, fitting, tell)
            comparison.save(output)
    if request.official and comparison.official is None:
        ours = find_estimator(_OURS, request.options)
        official = time_official(single, _OURS, ours, bar(on_progress, "official structure"))
        comparison = replace(comparison, official=official)
        comparison.save(output)
    return comparison


def _load_same(empty: EstimatorComparison, output: Path) -> EstimatorComparison:
    """Return what an earlier run did of the same comparison, or the one without figures."""
    # Files written before a bound was removed name it; null bounded nothing.
    options = {**empty.question["options"], "max_standard_error": None}
    same = (empty.question, {**empty.question, "options": options})
    earlier = load_if_current(output, EstimatorComparison.load, lambda old: old.question in same)
    return earlier or empty
