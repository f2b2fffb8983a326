"""`qvla bench engines`: latency of every engine on this machine's CPU, in one run."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import JsonOption
from qvla_export.cli.progress import WIDEST, print_result, progress_shown


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
    print_result(bench, bench.texts(output), as_json, WIDEST)
