"""`qvla calibrate`: the observations that everything is measured on and judged by."""

import typer

from qvla_export.cli.options import (
    CountOption,
    DatasetOption,
    ForceOption,
    FramesPerEpisodeOption,
    HeldOutOption,
    NewRunOption,
    SeedOption,
    SkipBadFramesOption,
    TasksOption,
    with_columns,
)
from qvla_export.cli.progress import progress_shown
from qvla_export.pipeline.data_source import USUAL_COLUMNS, ColumnOptions, open_dataset


@with_columns
def calibrate(
    run: NewRunOption,
    dataset: DatasetOption = None,
    columns: ColumnOptions = USUAL_COLUMNS,
    skip_bad_frames: SkipBadFramesOption = False,
    tasks: TasksOption = None,
    count: CountOption = 64,
    held_out: HeldOutOption = 64,
    frames_per_episode: FramesPerEpisodeOption = None,
    seed: SeedOption = 0,
    force: ForceOption = False,
) -> None:
    """Draw observations from demonstrations, or from simulated expert episodes."""
    from calibration.calibration_set import describe
    from qvla_export.pipeline.calibrate import CalibrationRequest, chosen_tasks
    from qvla_export.pipeline.calibrate import calibrate as draw_observations
    from qvla_export.pipeline.run_folder import RunFolder

    folder = RunFolder(run, force)
    opened = open_dataset(dataset, columns) if dataset else None
    request = CalibrationRequest(
        opened, chosen_tasks(tasks), count, held_out, seed, frames_per_episode, skip_bad_frames
    )
    with progress_shown() as on_progress:
        drawn = draw_observations(folder, request, on_progress)
    typer.echo(f"calibration: {describe(drawn)} -> {folder.calibration}")
