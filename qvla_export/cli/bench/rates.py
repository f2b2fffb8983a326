"""`qvla bench rates`: what this machine's CPU can do under ONNX Runtime."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import ThreadsOption


def rates(
    output: Annotated[Path, typer.Argument(help="JSON file for --rates.")],
    threads: ThreadsOption = None,
) -> None:
    """Measure this CPU's bandwidth, products and launches under ONNX Runtime; half a minute."""
    from qvla_export.pipeline.bench.rates import measure_rates

    measured = measure_rates(output, threads)
    tops = measured.mode.dense_tops
    typer.echo(
        f"rates of {measured.mode.name}: {measured.mode.bandwidth_gb_s:.1f} GB/s, float32 "
        f"{tops['float32'] * 1e3:.0f} GFLOP/s, int8 {tops['int8'] * 1e3:.0f} GOP/s -> {output}"
    )
