"""`qvla bench engines`: latency of every engine on this machine's CPU, in one run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import JsonOption
from qvla_export.cli.progress import print_json, progress_shown

# Wide enough wherever nobody looks at a terminal.
_TABLE_WIDTH = 132


def engines(
    output: Annotated[Path, typer.Option(help="JSON file with every sample.")] = Path("bench.json"),
    threads: Annotated[int, typer.Option(min=1, help="Threads of one operator.")] = 1,
    rounds: Annotated[int, typer.Option(min=2, help="Samples of each engine.")] = 30,
    modelopt: Annotated[
        Path | None,
        typer.Option(help="Environment with modelopt, made with pip if missing; else left out."),
    ] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: shows that it works.")] = False,
    clock: Annotated[
        Literal["wall", "cpu"],
        typer.Option(help="cpu: this process's time, comparable on a busy machine; one thread."),
    ] = "wall",
    regime: Annotated[
        Literal["both", "pass", "decode"], typer.Option(help="300 rows at once, or one.")
    ] = "both",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Of the decoder; 8 take 4 GB. Ratios need fewer.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Time float, other quantizers and ours on a random decoder: a whole pass, and decoding."""
    from qvla_export.pipeline.bench.engines import EngineBenchRequest, bench_engines

    with progress_shown() as on_progress:
        chosen = None if regime == "both" else regime
        request = EngineBenchRequest(threads, rounds, modelopt, quick, clock, chosen, layers)
        bench = bench_engines(request, output, on_progress)
    if as_json:
        print_json(bench.to_json())
        return
    for measured in bench.regimes:
        Console(width=_TABLE_WIDTH).print(_table(measured))
    peaks = bench.peaks
    typer.echo(
        f"peaks, {threads} thread(s): float32 {peaks.float32_gflops:.0f} GFLOP/s, int8 "
        f"{peaks.int8_gops:.0f} GOP/s, {peaks.bandwidth_gb_s:.1f} GB/s -> {output}"
    )


def _table(regime: Mapping[str, Any]) -> Table:
    title = "{regime}: width {width}, MLP {mlp}, {depth} layers, {tokens} token(s)"
    table = Table(title=title.format(**regime))
    for name in ("engine", "ms [p10, p90]", "x FP32 [95 %]", "of FP16 bytes", "peak", "bandwidth"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in regime["engines"]:
        ratio = row["speedup"]
        table.add_row(
            row["name"],
            f"{row['median_ms']:.2f} \\[{row['p10_ms']:.2f}, {row['p90_ms']:.2f}]",
            f"{ratio['median']:.2f} \\[{ratio['low']:.2f}, {ratio['high']:.2f}]",
            f"{row['share_of_float16']:.3f}",
            f"{row['gemm_peak_share']:.0%}",
            f"{row['bandwidth_share']:.0%}",
        )
    return table
