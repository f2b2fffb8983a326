"""What an evaluation says to a reader, in lines."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calibration.benchmarks.evaluation import Evaluation
from calibration.benchmarks.simulators import version_doubts


def evaluation_lines(evaluation: Evaluation, path: Path) -> Iterator[str]:
    """Yield the success by task and in all, how long thinking took and how the arm moved."""
    for task in evaluation.config.tasks:
        yield f"  {task}: {evaluation.success(task):.0%}"
    for name, share in evaluation.success_by_shift().items():
        yield f"  {name}: {share:.0%}"
    yield (
        f"{success_text(evaluation)}, {evaluation.solved_per_hour():.0f} solved an hour of motion "
        f"-> {path}"
    )
    if (chains := evaluation.chains()) is not None:
        yield f"  {chains}"
    if (taken := evaluation.infer_ms()) is not None:
        yield f"  thinking took {taken[0]:.1f} ms, 99 % within {taken[1]:.1f} ms"
    if (motion := evaluation.motion()) is not None:
        yield f"  {motion}"
    if by_phase := evaluation.error_by_phase():
        decided = [value for row in evaluation.results for value in row.deviations]
        parts = ", ".join(f"{phase} {value:.3g}" for phase, value in by_phase.items())
        yield f"  mean ||dA||^2 of a decision on policy {np.mean(decided):.3g}: {parts}"
    for doubt in version_doubts(evaluation.config.tasks, evaluation.versions):
        yield f"  warning: {doubt}"
    if any("-fast/" in task for task in evaluation.config.tasks):
        yield "  drawn fast: what collides, in plain colours; no figure to publish"


def success_text(evaluation: Evaluation) -> str:
    """Return the success of all episodes with its Wilson 95 % interval."""
    low, high = evaluation.interval()
    return (
        f"success {evaluation.success():.1%} [{low:.1%}, {high:.1%}] of "
        f"{len(evaluation.results)} episodes"
    )
