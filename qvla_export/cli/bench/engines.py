"""`qvla bench engines`: latency of every engine on this machine's CPU, in one run."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qvla_export.shared.artifacts import versions, write_json

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
) -> None:
    """Time float, other quantizers and ours on a random decoder: a whole pass, and decoding."""
    import tempfile

    import torch

    from engines.bench.modelopt import REQUIREMENTS, ModeloptEnvironment
    from engines.bench.peaks import measure_peaks
    from engines.bench.regimes import QUICK_REGIMES, REGIMES, run_regime

    torch.set_num_threads(threads)
    environment = None if modelopt is None else ModeloptEnvironment(modelopt)
    if environment is not None:
        environment.create()
    peaks = measure_peaks(threads, *((256, 1 << 22) if quick else ()))
    machine = _machine(threads, REQUIREMENTS[:1] if modelopt else ())
    found: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True)) as progress:
        for regime in QUICK_REGIMES if quick else REGIMES:
            task = progress.add_task(f"{regime.name}: rounds", total=rounds + 1)
            with tempfile.TemporaryDirectory() as folder:
                measured = run_regime(
                    regime,
                    Path(folder),
                    threads,
                    rounds,
                    peaks,
                    environment,
                    lambda task=task: progress.advance(task),  # type: ignore[misc]  # bound now
                )
            found.append(measured)
            # After each, so that an interrupted run leaves what it has.
            write_json(
                output, {**machine, "rounds": rounds, "peaks": vars(peaks), "regimes": found}
            )
    for measured in found:
        Console(width=_TABLE_WIDTH).print(_table(measured))
    typer.echo(
        f"peaks, {threads} thread(s): float32 {peaks.float32_gflops:.0f} GFLOP/s, int8 "
        f"{peaks.int8_gops:.0f} GOP/s, {peaks.bandwidth_gb_s:.1f} GB/s -> {output}"
    )


def _machine(threads: int, others: tuple[str, ...]) -> dict[str, Any]:
    import os
    import platform
    import sys

    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "command": " ".join(["qvla", *sys.argv[1:]]),
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "load_average": list(os.getloadavg()),
        "threads": threads,
        "versions": {**versions(), **dict(name.split("==") for name in others)},
        "note": "random weights, widths drawn at random: outputs mean nothing, times do. "
        "accuracy level 4 of 'ours w4', 'ours w3' and modelopt INT4 rounds activations to 8 bits",
    }


def _table(measured: dict[str, Any]) -> Table:
    title = "{regime}: width {width}, MLP {mlp}, {depth} layers, {tokens} token(s)"
    table = Table(title=title.format(**measured))
    for name in ("engine", "ms [p10, p90]", "x FP32 [95 %]", "of FP16 bytes", "peak", "bandwidth"):
        table.add_column(name, justify="left" if name == "engine" else "right")
    for row in measured["engines"]:
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
