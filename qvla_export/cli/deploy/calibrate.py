"""`qvla calibrate`: the observations that everything is measured on and judged by."""

from typing import Annotated

import typer

from qvla_export.cli.options import (
    CamerasOption,
    CountOption,
    DatasetOption,
    HeldOutOption,
    NewRunOption,
    SeedOption,
    StateColumnOption,
)


def calibrate(
    run: NewRunOption,
    dataset: DatasetOption = None,
    cameras: CamerasOption = None,
    state_column: StateColumnOption = "observation.state",
    count: CountOption = 64,
    held_out: HeldOutOption = 64,
    frames_per_episode: Annotated[
        int, typer.Option(min=1, help="Observations of one episode; cumulative sums want many.")
    ] = 2,
    seed: SeedOption = 0,
) -> None:
    """Draw observations from a LeRobot data set, or from simulated expert episodes."""
    from calibration.benchmarks.metaworld.tasks import TASKS
    from calibration.calibration_set import describe
    from qvla_export.pipeline import plan as stages
    from qvla_export.pipeline.calibrate import open_dataset
    from qvla_export.pipeline.run_folder import RunFolder

    folder = RunFolder(run)
    opened = open_dataset(dataset, cameras, state_column)
    drawn = stages.calibrate(folder, opened, list(TASKS), count, held_out, seed, frames_per_episode)
    typer.echo(f"calibration: {describe(drawn)} -> {folder.calibration}")
