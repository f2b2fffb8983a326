"""`qvla bench server`: what serving adds to the engine, beside servers of published structure."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import JsonOption
from qvla_export.cli.progress import print_json, progress_shown
from qvla_export.shared.artifacts import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jetson.clients.bench_preprocessing import PreprocessingTimes
    from jetson.clients.bench_server import ServerBenchmark

# Wide enough wherever nobody looks at a terminal.
_TABLE_WIDTH = 100


def server(
    output: Annotated[Path, typer.Option(help="JSON file with every sample.")] = Path(
        "bench-server.json"
    ),
    count: Annotated[int, typer.Option(min=1, help="Requests to each server.")] = 2000,
    side: Annotated[int, typer.Option(min=1, help="Pixels of a side of both images.")] = 224,
    frames: Annotated[int, typer.Option(min=1, help="Frames preprocessed of each size.")] = 200,
    as_json: JsonOption = False,
) -> None:
    """Time round trips with an engine that does nothing, all servers in turn, in one run."""
    from qvla_export.pipeline.bench.server import bench_server

    with progress_shown() as on_progress:
        bench = bench_server(count, side, frames, on_progress)
    write_json(output, bench.to_json())
    if as_json:
        print_json(bench.to_json())
        return
    for table in (_round_trips(bench.servers), _preprocessing(bench.preprocessing)):
        Console(width=_TABLE_WIDTH).print(table)
    typer.echo(f"bench server: {count} requests to each server -> {output}")


def _round_trips(servers: "ServerBenchmark") -> Table:
    table = Table(title=f"round trip, two images of {servers.side} x {servers.side}, loopback, ms")
    table.add_column("server")
    for percent in ("p50", "p90", "p99", "max"):
        table.add_column(percent, justify="right")
    for name in servers.round_trips_ms:
        figures = (servers.percentile(name, percent) for percent in (50, 90, 99, 100))
        table.add_row(name, *(f"{ms:.3f}" for ms in figures))
    return table


def _preprocessing(measured: "Mapping[str, PreprocessingTimes]") -> Table:
    table = Table(title="preprocessing a frame for two vision towers, p50, ms")
    for column in ("frame", "ours", "naive PIL", "ratio"):
        table.add_column(column, justify="left" if column == "frame" else "right")
    for name, times in measured.items():
        figures = times.to_json()
        values = (figures["ours_p50_ms"], figures["naive_p50_ms"], times.ratio)
        table.add_row(name, *(f"{value:.3f}" for value in values))
    return table
