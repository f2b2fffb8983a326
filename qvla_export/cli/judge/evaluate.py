"""`qvla evaluate`: a policy in closed loop."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    A_POLICY,
    PresetOption,
    TasksOption,
    UnnormKeyOption,
    WorkersOption,
)


def evaluate(
    policy: Annotated[
        str,
        typer.Argument(help="Checkpoint, bundle, or URL of a server.", callback=A_POLICY.require),
    ],
    output: Annotated[Path, typer.Option("--output", help="Evaluation JSON to write.")],
    tasks: TasksOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes of each task.")] = 20,
    seed: Annotated[int, typer.Option(help="First episode seed; equal seeds are paired.")] = (
        1_000_000
    ),
    execute: Annotated[int, typer.Option(help="Actions executed before looking again.")] = 8,
    control: Annotated[str, typer.Option(help="none, blank-image or wrong-instruction.")] = "none",
    reference: Annotated[
        str | None,
        typer.Option(
            help="Policy to compare every decision with; gives cumulative deviation.",
            callback=A_POLICY.require,
        ),
    ] = None,
    workers: WorkersOption = 2,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Run closed-loop episodes in the simulator; success with its Wilson 95 % interval."""
    from calibration.benchmarks.evaluation import RolloutConfig
    from calibration.benchmarks.rollouts import evaluate as run_episodes
    from qvla_export.pipeline.calibrate import chosen_tasks
    from qvla_export.pipeline.policy_source import PolicySource

    config = RolloutConfig(chosen_tasks(tasks), episodes, seed, execute, control)  # type: ignore[arg-type]  # checked there
    source = PolicySource(policy, unnorm_key, preset, threads=1)
    other = None if reference is None else PolicySource(reference, unnorm_key, preset, threads=1)
    digest = source.digest(source())
    # Opened here as well, so that a bad reference is refused before any episode.
    other_digest = "" if other is None else other.digest(other())
    result = run_episodes(
        Path(policy).name, digest, source, config, output, other, workers, other_digest
    )
    low, high = result.interval()
    for task in result.config.tasks:
        typer.echo(f"  {task}: {result.success(task):.0%}")
    typer.echo(
        f"success {result.success():.1%} [{low:.1%}, {high:.1%}] of {len(result.results)} "
        f"episodes -> {output}"
    )
