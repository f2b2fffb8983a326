"""`qvla estimators`: ranks of all estimators against exact measurement, time, memory."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    A_RUN,
    JsonOption,
    PolicyOption,
    PresetOption,
    ProbesOption,
    RunOption,
    SeedOption,
    ShareOption,
    TargetOption,
    UnnormKeyOption,
)
from qvla_export.cli.progress import WIDEST, print_texts, progress_shown


def estimators(
    run: RunOption,
    policy: PolicyOption,
    target: TargetOption = "cpu",
    output: Annotated[
        Path | None,
        typer.Option(
            help="JSON file; an interrupted run goes on. Default: estimators.json in the run "
            "folder, where qvla report finds it."
        ),
    ] = None,
    pairs: Annotated[
        int, typer.Option(help="(channel, width) pairs, of every layer at every width.")
    ] = 2000,
    observations: Annotated[
        int | None, typer.Option(min=1, help="Of the calibration set, the first; default all.")
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option("--method", help="Estimator, beside exact; repeat. Default: all."),
    ] = None,
    probes: ProbesOption = 4,
    exact_share: ShareOption = 0.02,
    episodes: Annotated[
        Path | None,
        typer.Option(
            help="Run folder whose calibration set cumulative estimators sum along.",
            callback=A_RUN.require,
        ),
    ] = None,
    rollouts: Annotated[
        str | None,
        typer.Option(help="Simulator tasks (as --tasks): their first steps rank the pairs too."),
    ] = None,
    official: Annotated[
        bool, typer.Option(help="Time the official procedure's structure as well.")
    ] = True,
    seed: SeedOption = 0,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads, of all alike.")] = 1,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare all estimators on one sample of channels: ranks against exact, time, memory."""
    import torch

    from engines.targets import find_target
    from qvla_export.pipeline.calibrate import chosen_tasks
    from qvla_export.pipeline.estimators import EstimatorRequest, compare_estimators
    from qvla_export.pipeline.policy_source import open_checkpoint
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.pipeline.texts.estimator_texts import estimator_texts
    from qvla_export.sensitivity.estimators.registry import Options

    torch.set_num_threads(threads)
    request = EstimatorRequest(
        run=RunFolder(run),
        policy=open_checkpoint(policy, unnorm_key, preset),
        target=find_target(target),
        options=Options(probes or None, exact_share),
        methods=tuple(methods) if methods else None,
        pairs=pairs,
        observations=observations,
        episodes=episodes,
        rollouts=() if rollouts is None else chosen_tasks(rollouts),
        official=official,
        seed=seed,
    )
    output = output or request.run.estimators
    with progress_shown() as on_progress:
        comparison = compare_estimators(request, output, on_progress)
    if as_json:
        typer.echo(output.read_text())
        return
    print_texts(estimator_texts(comparison, output), WIDEST)
