"""Commands of the host side: from data to bundles."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.allocation.setting import parse_setting
from qvla_export.cli import baseline as baselining
from qvla_export.cli import bench as benching
from qvla_export.cli import bench_allocation as benching_allocation
from qvla_export.cli import bench_server as benching_server
from qvla_export.cli import build as building
from qvla_export.cli import check as checking
from qvla_export.cli import compare as compare_command
from qvla_export.cli import deploy as deploying
from qvla_export.cli import doctor as examining
from qvla_export.cli import evaluate as judging_commands
from qvla_export.cli import load as loading
from qvla_export.cli import plan as planning
from qvla_export.cli import predict as predicting
from qvla_export.cli import quantize as quantizing
from qvla_export.cli import real_size
from qvla_export.cli import replay as replaying
from qvla_export.cli import run as running
from qvla_export.cli import sensitivities as measuring
from qvla_export.cli import serve as robot
from qvla_export.cli import simulator as simulation
from qvla_export.cli import smooth as smoothing
from qvla_export.cli import verify as verifying
from qvla_export.cli.options import (
    CamerasOption,
    DatasetOption,
    DeviceOption,
    PolicyOption,
    PresetOption,
    RunOption,
    SeedOption,
    SettingOption,
    StateColumnOption,
    TargetOption,
    UnnormKeyOption,
    WaitOption,
    open_checkpoint,
    open_dataset,
)
from qvla_export.pipeline.run_folder import RunFolder

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantize a robot policy by what each weight channel does to the action, and serve it.",
)


@app.command()
def calibrate(
    run: RunOption,
    dataset: DatasetOption = None,
    cameras: CamerasOption = None,
    state_column: StateColumnOption = "observation.state",
    count: Annotated[int, typer.Option(help="Observations to measure on.")] = 64,
    held_out: Annotated[int, typer.Option(help="Observations to judge by.")] = 64,
    frames_per_episode: Annotated[
        int, typer.Option(min=1, help="Observations of one episode; cumulative sums want many.")
    ] = 2,
    seed: SeedOption = 0,
) -> None:
    """Draw observations from a LeRobot data set, or from simulated expert episodes."""
    from calibration.benchmarks.metaworld.tasks import TASKS
    from calibration.calibration_set import describe
    from qvla_export.pipeline import plan as stages

    folder = RunFolder(run)
    opened = open_dataset(dataset, cameras, state_column)
    drawn = stages.calibrate(folder, opened, list(TASKS), count, held_out, seed, frames_per_episode)
    typer.echo(f"calibration: {describe(drawn)} -> {folder.calibration}")


@app.command()
def activations(
    run: RunOption,
    policy: PolicyOption,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    device: DeviceOption = "auto",
    wait_minutes: WaitOption = 60.0,
) -> None:
    """Record what the layers are fed; settings such as w8a8 take their ranges from it.

    Under torchrun, processes share the observations.
    """
    from qvla_export.pipeline import plan as stages
    from qvla_export.pipeline.resources import joined_resources

    folder = RunFolder(run)
    with joined_resources(device, wait_minutes) as resources:
        loaded = open_checkpoint(policy, unnorm_key, preset)
        loaded.module.to(resources.world.device)
        fed = stages.activations(folder, loaded, resources.world)
    if resources.world.rank:
        return  # process 0 speaks for all
    layers = sum(len(names) for names in fed.histograms)
    typer.echo(
        f"activations: {len(fed.histograms)} inputs of {layers} layers on {fed.samples} "
        f"observations -> {folder.activations}"
    )


@app.command()
def export(
    run: RunOption,
    policy: PolicyOption,
    setting: SettingOption,
    target: TargetOption = "cpu",
    layers_per_part: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Decoder blocks a stage: for a policy that does not fit into memory. Default: "
            "one graph of the whole policy.",
        ),
    ] = None,
    accuracy_level: Annotated[
        int,
        typer.Option(
            min=0,
            max=4,
            help="Of the cpu target's packed products: 0 keeps float activations; 4 rounds them "
            "to 8 bits a block, much faster where a layer sees few rows.",
        ),
    ] = 0,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Write the bundle a robot receives: bucketed ONNX, packed weights, golden observations."""
    from engines.targets import find_target
    from qvla_export.pipeline import export as exporting

    folder, device = RunFolder(run), find_target(target)
    wanted = parse_setting(setting, device)
    loaded = open_checkpoint(policy, unnorm_key, preset, resident=layers_per_part is None)
    bundle = exporting.export(folder, wanted, loaded, device, layers_per_part, accuracy_level)
    typer.echo(f"bundle: {bundle.nbytes / 1e6:.2f} MB -> {bundle.path}")
    typer.echo(exporting.graph_figures(bundle))


@app.command()
def report(run: Annotated[Path, typer.Argument(help="Run folder.")]) -> None:
    """Write one self-contained HTML page about a run."""
    from qvla_export.report.page import write_report

    typer.echo(f"report: {write_report(run)}")


simulation.register(app)
measuring.register(app)
planning.register(app)
judging_commands.register(app)
checking.register(app)
compare_command.register(app)
building.register(app)
smoothing.register(app)
baselining.register(app)
benching.register(app)
benching_allocation.register(app)
benching_server.register(app)
loading.register(app)
verifying.register(app)
examining.register(app)
robot.register(app)
replaying.register(app)
running.register(app)
predicting.register(app)
quantizing.register(app)
real_size.register(app)
deploying.register(app)
