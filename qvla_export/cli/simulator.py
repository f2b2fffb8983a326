"""Commands that need the simulator: demonstrations and training of the reference policy."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import SeedOption, WorkersOption

TasksOption = Annotated[
    str | None, typer.Option("--tasks", help="Comma-separated task names; all by default.")
]


def chosen_tasks(names: str | None) -> tuple[str, ...]:
    """Return task names, all if none are given.

    Raises:
        QvlaError: a name is unknown.
    """
    from calibration.benchmarks.metaworld.tasks import TASKS, find_task

    if names is None:
        return tuple(TASKS)
    return tuple(find_task(name.strip()).name for name in names.split(","))


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(demonstrations)
    app.command()(train)


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

    chosen = [find_task(name) for name in chosen_tasks(tasks)]
    record_demonstrations(output, chosen, episodes, Recording(seed=seed), workers)
    typer.echo(f"demonstrations: {episodes} episodes of {len(chosen)} tasks -> {output}")


def train(
    dataset: Annotated[Path, typer.Argument(help="LeRobotDataset v3.0 folder.")],
    output: Annotated[Path, typer.Argument(help="Folder of the training; continued if it exists.")],
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 6000,
    batch_size: Annotated[int, typer.Option(help="Samples a step.")] = 64,
    precision: Annotated[str, typer.Option(help="bf16 (AVX512-BF16 CPUs) or fp32.")] = "bf16",
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    seed: SeedOption = 0,
) -> None:
    """Train a small OpenVLA-OFT policy from demonstrations by imitation."""
    import torch

    from calibration.training.train import OftSize, TrainingConfig, train_policy

    torch.set_num_threads(threads)
    config = replace(
        TrainingConfig(), steps=steps, batch_size=batch_size, precision=precision, seed=seed
    )
    checkpoint = train_policy(dataset, output, OftSize(), config, "metaworld_scripted")
    typer.echo(f"trained: {checkpoint}")
