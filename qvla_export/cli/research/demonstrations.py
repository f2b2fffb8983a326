"""`qvla demonstrations`: scripted experts, recorded as a data set."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import SeedOption, TasksOption, WorkersOption
from qvla_export.cli.progress import progress_shown


def demonstrations(
    output: Annotated[Path, typer.Argument(help="LeRobotDataset folder to create.")],
    tasks: TasksOption = None,
    episodes: Annotated[int, typer.Option(help="Successful episodes of each task.")] = 250,
    seed: SeedOption = 20261,
    workers: WorkersOption = 2,
) -> None:
    """Record scripted experts in the simulator as a LeRobotDataset v3.0."""
    from calibration.benchmarks.metaworld.demonstrations import Recording, record_demonstrations
    from calibration.benchmarks.metaworld.tasks import find_task
    from qvla_export.pipeline.calibrate import chosen_tasks
    from qvla_export.pipeline.progress import bar

    chosen = [find_task(name) for name in chosen_tasks(tasks)]
    with progress_shown() as on_progress:
        tell = bar(on_progress, "demonstrations")
        record_demonstrations(output, chosen, episodes, Recording(seed=seed), workers, tell)
    typer.echo(f"demonstrations: {episodes} episodes of {len(chosen)} tasks -> {output}")
