"""Two policies' evaluations side by side: the same episodes, success and motion."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qvla_export.comparison.paired import PairedDifference, paired_difference
from qvla_export.shared.errors import ArtifactMismatch

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation
    from calibration.benchmarks.motion import MotionSummary


@dataclass(frozen=True)
class EvaluationPair:
    """A policy's episodes beside another's of the same scenes."""

    success: PairedDifference
    # Different scenes among the episodes; the interval takes episodes of one scene together.
    scenes: int
    # None in evaluations of earlier versions.
    motion: "MotionSummary | None"
    other_motion: "MotionSummary | None"

    def __str__(self) -> str:
        low, high = 100 * self.success.low, 100 * self.success.high
        return (
            f"{100 * self.success.value:+.1f} points [{low:+.1f}, {high:+.1f}] of "
            f"{self.success.episodes} paired episodes in {self.scenes} scenes"
            + ("" if self.other_motion is None else f"; there {self.other_motion}")
        )


def pair_evaluations(evaluation: "Evaluation", other: "Evaluation") -> EvaluationPair:
    """Compare two evaluations episode by episode, over the episodes that both have.

    Tasks of one scene are put in the same places by the same seed, so their episodes count as one
    cluster.

    Raises:
        ArtifactMismatch: their episodes are not the same or not executed alike.
    """
    from calibration.benchmarks.metaworld.tasks import find_task

    shared = min(evaluation.config.episodes, other.config.episodes)
    if replace(evaluation.config, episodes=shared) != replace(other.config, episodes=shared):
        raise ArtifactMismatch(
            f"paired evaluations must be of the same episodes, got {evaluation.config} and "
            f"{other.config}; evaluate both with the same --tasks, --seed, --execute and --control"
        )
    ours, theirs = _first(evaluation, shared), _first(other, shared)
    scenes = [(find_task(row.task).scene, row.seed) for row in ours.results]
    difference = paired_difference(
        [row.success for row in ours.results], [row.success for row in theirs.results], scenes
    )
    return EvaluationPair(difference, len(set(scenes)), ours.motion(), theirs.motion())


def _first(evaluation: "Evaluation", episodes: int) -> "Evaluation":
    """Return the first episodes of each task of an evaluation."""
    last = evaluation.config.seed + episodes
    results = tuple(row for row in evaluation.results if row.seed < last)
    return replace(evaluation, results=results)
