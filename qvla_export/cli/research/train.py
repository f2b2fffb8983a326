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
    recipe: Annotated[
        str,
        typer.Option(
            help="pictures: the reference policy. object-state: a small policy of the precise "
            "tasks that sees no picture but where things are, in numbers. pretrained: the precise "
            "tasks in pictures of two cameras, on a frozen DINOv2-small (qvla[pretrained])."
        ),
    ] = "pictures",
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps; the recipe's by default.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples a step; the recipe's by default.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="bf16 (AVX512-BF16 CPUs) or fp32; the recipe's by default."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    seed: SeedOption = 0,
) -> None:
    """Train a small OpenVLA-OFT policy from demonstrations by imitation."""
    import torch

    from calibration.training.recipes import find_recipe
    from calibration.training.train import train_policy
    from qvla_export.pipeline.progress import bar

    torch.set_num_threads(threads)
    chosen = find_recipe(recipe)
    named = {"steps": steps, "batch_size": batch_size, "precision": precision, "seed": seed}
    config = replace(chosen.training, **{k: v for k, v in named.items() if v is not None})  # type: ignore[arg-type]  # by name
    with progress_shown() as on_progress:
        tell = bar(on_progress, "training")
        name, size = chosen.data_name, chosen.size
        checkpoint = train_policy(dataset, output, size, config, name, tell, chosen.policy)
    typer.echo(f"trained: {checkpoint}")
