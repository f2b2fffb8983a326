"""`qvla bench server`: what serving adds to the engine, beside servers of published structure."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import JsonOption
from qvla_export.cli.progress import NARROW, print_result, progress_shown
from qvla_export.shared.artifacts import write_json


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
    print_result(bench, bench.texts(output), as_json, NARROW)
