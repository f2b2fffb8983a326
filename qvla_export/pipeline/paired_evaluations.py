"""Two policies' evaluations side by side: the same episodes, success and motion."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from qvla_export.comparison.paired import (
    MeanDifference,
    PairedDifference,
    mean_difference,
    paired_difference,
)
from qvla_export.shared.errors import ArtifactMismatch

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
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
    # Of gripper flips an episode and of an episode's RMS jerk, m/s^3; None without motion.
    flips: MeanDifference | None
    jerk_rms: MeanDifference | None
    # Of the tasks that a chain of five solves in a row; None of fewer tasks or a single seed.
    chain_length: MeanDifference | None
    # How time passes there, where it passes differently.
    other_timing: str | None

    def __str__(self) -> str:
        low, high = 100 * self.success.low, 100 * self.success.high
        words = [
            f"{100 * self.success.value:+.1f} points [{low:+.1f}, {high:+.1f}] of "
            f"{self.success.episodes} paired episodes in {self.scenes} scenes"
        ]
        words += [] if self.flips is None else [f"{self.flips} gripper flips an episode"]
        words += [] if self.jerk_rms is None else [f"{self.jerk_rms} m/s^3 of RMS jerk"]
        words += [] if self.chain_length is None else [f"{self.chain_length} tasks in a row"]
        words += [] if self.other_timing is None else [f"there {self.other_timing}"]
        words += [] if self.other_motion is None else [f"there {self.other_motion}"]
        return "; ".join(words)


def pair_evaluations(evaluation: "Evaluation", other: "Evaluation") -> EvaluationPair:
    """Compare two evaluations episode by episode, over the episodes that both have.

    Tasks of one scene are put in the same places by the same seed, so their episodes count as one
    cluster. How time passes while a policy thinks may differ: that is how a delay is judged.

    Raises:
        ArtifactMismatch: their episodes are not the same or not executed alike.
    """
    from calibration.benchmarks.simulators import find_benchmark_task

    shared = min(evaluation.config.episodes, other.config.episodes)
    if _episodes(evaluation.config, shared) != _episodes(other.config, shared):
        raise ArtifactMismatch(
            f"paired evaluations must be of the same episodes, got {evaluation.config} and "
            f"{other.config}; evaluate both with the same --tasks, --seed, --execute, --shift and "
            "--control"
        )
    ours, theirs = _first(evaluation, shared), _first(other, shared)
    scenes = [(find_benchmark_task(row.task).scene, row.seed) for row in ours.results]
    difference = paired_difference(
        [row.success for row in ours.results], [row.success for row in theirs.results], scenes
    )
    moved = [
        (row.motion, there.motion)
        for row, there in zip(ours.results, theirs.results, strict=True)
        if row.motion is not None and there.motion is not None
    ]
    flips = jerk = None
    if len(moved) == len(scenes) and len(set(scenes)) > 1:
        flips = mean_difference([a.gripper_flips - b.gripper_flips for a, b in moved], scenes)
        jerk = mean_difference([a.jerk_rms - b.jerk_rms for a, b in moved], scenes)
    timing, there_timing = evaluation.config.timing, other.config.timing
    return EvaluationPair(
        difference,
        len(set(scenes)),
        ours.motion(),
        theirs.motion(),
        flips,
        jerk,
        _chain_difference(ours.chain_lengths(), theirs.chain_lengths()),
        None if timing == there_timing else there_timing,
    )


def _chain_difference(ours: list[int], theirs: list[int]) -> MeanDifference | None:
    """Return by how much chains of the same seeds differ; each chain is independent."""
    if len(ours) < 2:
        return None
    differences = [float(a - b) for a, b in zip(ours, theirs, strict=True)]
    return mean_difference(differences, range(len(ours)))


def _episodes(config: "RolloutConfig", count: int) -> "RolloutConfig":
    """Return which episodes are run, so many of each task, however time passes."""
    timeless = replace(config, delay_steps=0, live=False, roll_forward=False, seam_limit_mm=0.0)
    return replace(timeless, episodes=count)


def _first(evaluation: "Evaluation", episodes: int) -> "Evaluation":
    """Return the first episodes of each task of an evaluation."""
    last = evaluation.config.seed + episodes
    results = tuple(row for row in evaluation.results if row.seed < last)
    return replace(evaluation, results=results)
