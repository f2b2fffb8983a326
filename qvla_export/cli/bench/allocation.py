"""`qvla bench allocation`: time, memory and gap of the allocators at a published policy's size."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import JsonOption, TargetOption
from qvla_export.cli.progress import print_result, progress_shown
from qvla_export.shared.artifacts import write_json


def allocation(
    geometry: Annotated[str, typer.Option(help="Published size.")] = "openvla-7b",
    methods: Annotated[
        str, typer.Option(help="Comma-separated allocators.")
    ] = "hull,algorithm1,staged,gates,per-layer,per-module,uniform",
    bits: Annotated[float, typer.Option(help="Mean bits per channel.")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1, help="Allocations of each method.")] = 3,
    target: TargetOption = "cpu",
    output: Annotated[Path | None, typer.Option(help="Figures as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Allocate a random table of a published policy's size by each method."""
    from qvla_export.pipeline.bench.allocation import bench_allocation

    names = [method.strip() for method in methods.split(",")]
    with progress_shown() as on_progress:
        compared = bench_allocation(geometry, names, bits, target, rounds, on_progress)
    if output is not None:
        write_json(output, compared.to_json())
    print_result(compared, [compared.table()], as_json)
