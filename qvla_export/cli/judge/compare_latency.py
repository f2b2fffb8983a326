"""`qvla compare-latency`: what changed between two latencies, and whether that is noise."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qvla_export.cli.options import A_LATENCY, JsonOption
from qvla_export.cli.progress import print_json

if TYPE_CHECKING:
    from collections.abc import Iterable

    from jetson.latency.regression import LatencyChange

_TWO_RUNS = (
    "note: the intervals know what varies within a run, not from run to run; to be sure, profile "
    "both in one run and compare its pairs: qvla profile OLD NEW --output RUN.json"
)
# Wide enough wherever nobody looks at a terminal.
_TABLE_WIDTH = 120


def compare_latency(
    base: Annotated[
        Path, typer.Argument(help="Latency JSON of what was.", callback=A_LATENCY.require)
    ],
    changed: Annotated[
        Path | None,
        typer.Argument(
            help="Latency JSON of what is; without it, the policies of one run.",
            callback=A_LATENCY.require,
        ),
    ] = None,
    base_name: Annotated[str | None, typer.Option("--base", help="Profile's name there.")] = None,
    new_name: Annotated[str | None, typer.Option("--new", help="Profile's name here.")] = None,
    tolerance: Annotated[float, typer.Option(help="Share by which it may be slower.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    allow_different: Annotated[
        bool, typer.Option(help="Compare other machines, targets and transports all the same.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="JSON of the comparison to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare latencies with bootstrap intervals; exit 2 if the total is slower than tolerated."""
    from qvla_export.pipeline.compare_latency import compare_latency_files
    from qvla_export.shared.artifacts import write_json

    changes = compare_latency_files(
        base, changed, base_name, new_name, tolerance, seed, allow_different
    )
    content = {"changes": [change.to_json() for change in changes]}
    if output is not None:
        write_json(output, content)
    if as_json:
        print_json(content)
    else:
        _print(changes, two_runs=changed is not None)
    for change in changes:
        change.require_not_slower()


def _print(changes: "Iterable[LatencyChange]", two_runs: bool) -> None:
    from qvla_export.cli.judge.latency_tables import change_table

    for change in changes:
        Console(width=_TABLE_WIDTH).print(change_table(change))
        for note in change.notes:
            typer.echo(f"note: {note}")
    if two_runs:
        typer.echo(_TWO_RUNS)
