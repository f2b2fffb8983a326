"""`qvla bench gpu`: what this machine's GPU computes, beside its CPU."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import A_CHECKPOINT
from qvla_export.cli.progress import progress_shown


def gpu(
    output: Annotated[Path, typer.Option(help="JSON file; a page is written beside it.")] = Path(
        "gpu.json"
    ),
    policy: Annotated[
        Path, typer.Option(help="Small checkpoint.", callback=A_CHECKPOINT.require)
    ] = Path("checkpoints/reference"),
) -> None:
    """Measure, round and run a small policy on an NVIDIA GPU and on the CPU; minutes."""
    from qvla_export.pipeline.bench.gpu import bench_gpu, require_gpu

    device = require_gpu()
    with progress_shown() as on_progress:
        bench = bench_gpu(policy, output, device, on_progress=on_progress)
    for line in bench.lines():
        typer.echo(line)
    typer.echo(f"gpu: {output}, {output.with_suffix('.html')}")
