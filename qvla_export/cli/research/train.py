"""`qvla train`: a small policy from demonstrations, by imitation."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import SeedOption, local_dataset
from qvla_export.cli.progress import progress_shown


def train(
    dataset: Annotated[Path, typer.Argument(help="LeRobotDataset folder.", callback=local_dataset)],
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
    from qvla_export.pipeline.progress import bar

    torch.set_num_threads(threads)
    config = replace(
        TrainingConfig(), steps=steps, batch_size=batch_size, precision=precision, seed=seed
    )
    with progress_shown() as on_progress:
        tell = bar(on_progress, "training")
        checkpoint = train_policy(dataset, output, OftSize(), config, "metaworld_scripted", tell)
    typer.echo(f"trained: {checkpoint}")
