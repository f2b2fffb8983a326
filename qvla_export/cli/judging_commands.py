"""Commands that judge a policy or bundle: evaluate, profile."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from qvla_export.cli.opening import PolicySource
from qvla_export.cli.options import (
    PresetOption,
    ThreadsOption,
    UnnormKeyOption,
    WeightsOption,
    WorkersOption,
)
from qvla_export.cli.simulation import TasksOption, chosen_tasks


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(evaluate)
    app.command()(profile)


def evaluate(
    policy: Annotated[str, typer.Argument(help="Checkpoint, bundle, or URL of a server.")],
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
        typer.Option(help="Policy to compare every decision with; gives cumulative deviation."),
    ] = None,
    workers: WorkersOption = 2,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Run closed-loop episodes in the simulator; success with its Wilson 95 % interval."""
    from calibration.evaluation import RolloutConfig
    from calibration.rollouts import evaluate as run_episodes

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


def profile(
    bundles: Annotated[list[str], typer.Argument(help="Bundles or server URLs; first = baseline.")],
    output: Annotated[Path, typer.Option("--output", help="Latency JSON to write.")],
    samples: Annotated[int, typer.Option(help="Actions of each policy.")] = 200,
    warmup: Annotated[int, typer.Option(help="Actions before the samples.")] = 10,
    recording: Annotated[
        Path | None,
        typer.Option(help="MCAP file whose observations are sent; default: blank pictures."),
    ] = None,
    threads: ThreadsOption = None,
    weights: WeightsOption = "packed",
) -> None:
    """Measure decode, preprocess, engine, postprocess and encode, policies interleaved."""
    from rich.progress import Progress

    from jetson.contract import contract_of
    from jetson.profiling import profile_latency
    from qvla_export.cli.stages import bar

    opened: dict[str, Any] = {}
    cold_start_ms: dict[str, float] = {}
    with ExitStack() as stack, Progress() as progress:
        for place in bundles:
            start = time.perf_counter()
            policy = PolicySource(place, threads=threads, weights=weights)()
            cold_start_ms[place] = (time.perf_counter() - start) * 1e3
            opened[place] = policy
            if hasattr(policy, "close"):
                stack.callback(policy.close)
        if recording is None:
            observations = [contract_of(next(iter(opened.values()))).blank_observation()]
        else:
            from jetson.recording.reader import Recording

            observations = Recording(recording).observations()
        compared = profile_latency(
            opened, observations, warmup, samples, bar(progress, "latency"), cold_start_ms
        )
    compared.save(output)
    for measured in compared.profiles:
        typer.echo(
            f"{measured.name}: p50 {measured.percentile_ms(50):.2f} ms, "
            f"p99 {measured.percentile_ms(99):.2f} ms ({measured.transport})"
        )
    typer.echo(f"latency: {output}")
