"""`qvla deploy`: every stage in order, from a checkpoint to a report."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    CountOption,
    DatasetOption,
    ForceOption,
    FramesPerEpisodeOption,
    HeldOutOption,
    JsonOption,
    NewRunOption,
    PlanOnlyOption,
    PolicyOption,
    PresetOption,
    ProbesOption,
    QuantizerOption,
    RangesOption,
    SeedOption,
    SkipBadFramesOption,
    TargetOption,
    TasksOption,
    TuneCodesOption,
    UnnormKeyOption,
    UsualScalesOption,
    WorkersOption,
    ZeroPointsOption,
    with_columns,
    with_holding,
    with_tolerance,
)
from qvla_export.cli.progress import print_result, progress_shown
from qvla_export.pipeline.data_source import USUAL_COLUMNS, ColumnOptions, open_dataset
from qvla_export.pipeline.recommend.tolerance import USUAL_TOLERANCE, Tolerance
from qvla_export.pipeline.sizing.holding import USUAL_HOLDING, HoldingOptions


@with_columns
@with_holding
@with_tolerance
def deploy(
    policy: PolicyOption = Path("checkpoints/reference"),
    run: NewRunOption = Path("runs/demo"),
    target: TargetOption = "cpu",
    settings: Annotated[
        str,
        typer.Option(
            help="Comma-separated: float, w<mean bits>, w<bits>-rtn. The default is the setting "
            "that is recommended first, and what it is held against."
        ),
    ] = "float,w4",
    dataset: DatasetOption = None,
    columns: ColumnOptions = USUAL_COLUMNS,
    skip_bad_frames: SkipBadFramesOption = False,
    tasks: TasksOption = None,
    count: CountOption = 64,
    held_out: HeldOutOption = 64,
    frames_per_episode: FramesPerEpisodeOption = None,
    episodes: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Simulated episodes of each task and setting; default 20, with --dataset 0.",
        ),
    ] = None,
    check_pairs: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="(channel, width) pairs compared with exact measurement. Default: as many as take "
            "about a minute of CPU, at most 500; none where the policy is read part by part.",
        ),
    ] = None,
    probes: ProbesOption = 4,
    samples: Annotated[int, typer.Option(min=1, help="Actions of each latency profile.")] = 200,
    threads: Annotated[
        int, typer.Option(min=1, help="CPU threads of each engine in the latency profile.")
    ] = 1,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    seed: SeedOption = 0,
    workers: WorkersOption = 2,
    quantizer: QuantizerOption = None,
    zero_points: ZeroPointsOption = False,
    scales: UsualScalesOption = None,
    activations_method: RangesOption = "percentile",
    tune_codes: TuneCodesOption = False,
    options: HoldingOptions = USUAL_HOLDING,
    force: ForceOption = False,
    tolerance: Tolerance = USUAL_TOLERANCE,
    plan_only: PlanOnlyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run every stage: calibration, sensitivities, plans, bundles, judgement, latency, report."""
    from engines.targets import find_target
    from qvla_export.allocation.setting import parse_setting, usual_scales
    from qvla_export.pipeline.calibrate import CalibrationRequest, chosen_tasks
    from qvla_export.pipeline.deploy import Deployment
    from qvla_export.pipeline.deploy import deploy as run_steps
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.pipeline.sizing.forecast import forecast
    from qvla_export.pipeline.sizing.hold import hold
    from qvla_export.pipeline.texts.stage_texts import deployment_texts

    found = find_target(target, zero_points, scales or "group")
    chosen = tuple(parse_setting(name.strip(), found) for name in settings.split(","))
    scales = scales or usual_scales(chosen, found)
    opened_data = open_dataset(dataset, columns) if dataset else None
    played = chosen_tasks(tasks) if dataset is None or episodes else ()
    played_times = (20 if dataset is None else 0) if episodes is None else episodes
    request = Deployment(
        RunFolder(run, force),
        PolicySource(str(policy), unnorm_key, preset, threads=1),
        chosen,
        target,
        CalibrationRequest(
            opened_data, played, count, held_out, seed, frames_per_episode, skip_bad_frames
        ),
        *(played, played_times, check_pairs, samples, threads, seed, workers, probes or None),
        *(quantizer or "compensated", zero_points, scales, activations_method, tune_codes),
        command=shlex.join(["qvla", *sys.argv[1:]]),
        tolerance=tolerance,
    )
    _say(request.describe())
    request, opened = hold(request, options)
    _say(request.holding.describe())
    if plan_only:
        typer.echo(forecast(request, opened).text(as_json))
        return
    with progress_shown() as on_progress:
        result = run_steps(request, opened, on_progress)
    print_result(result, deployment_texts(result, found.name), as_json)


def _say(text: str) -> None:
    """Print a line beside the progress, on stderr, whole."""
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(text, markup=False)
