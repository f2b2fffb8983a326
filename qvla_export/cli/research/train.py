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
    family: Annotated[
        str,
        typer.Option(help="oft, openvla, univla, pi0, pi0.5, smolvla or act: whose policy it is."),
    ] = "oft",
    recipe: Annotated[
        str | None,
        typer.Option(
            help="Of oft. pictures (default): the reference policy. object-state: of the precise "
            "tasks, shown where things are, in numbers. pretrained: of these in pictures of two "
            "cameras, on a frozen DINOv2-small (qvla[pretrained])."
        ),
    ] = None,
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
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Of oft. Compile the network first: a minute and a C++ compiler for faster steps.",
        ),
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    seed: SeedOption = 0,
) -> None:
    """Train a small policy of any family from demonstrations by imitation."""
    import torch

    from calibration.training.recipes import named_recipe
    from calibration.training.train import train_recipe
    from qvla_export.pipeline.progress import bar

    torch.set_num_threads(threads)
    chosen = named_recipe(family, recipe)
    named = {"steps": steps, "batch_size": batch_size, "precision": precision, "seed": seed}
    given = {name: value for name, value in named.items() if value is not None}
    config = replace(chosen.training, compiled=compiled, **given)  # type: ignore[arg-type]  # by name
    with progress_shown() as on_progress:
        checkpoint = train_recipe(dataset, output, chosen, config, bar(on_progress, "training"))
    typer.echo(f"trained: {checkpoint}")
