"""`qvla compare-latency`: what changed between two latencies, and whether that is noise."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qvla_export.cli.options import A_LATENCY
from qvla_export.shared.artifacts import write_json

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
) -> None:
    """Compare latencies with bootstrap intervals; exit 2 if the total is slower than tolerated."""
    from jetson.latency.comparison import LatencyComparison
    from jetson.latency.regression import compare_latency as compare
    from jetson.latency.regression import match_profiles, pair_profiles
    from qvla_export.cli.judge.latency_tables import change_table

    before = LatencyComparison.load(base)
    if changed is None:
        pairs = pair_profiles(before, base_name, new_name)
    else:
        after = LatencyComparison.load(changed)
        pairs = match_profiles(before, after, base_name, new_name)
    changes = [
        compare(old, new, changed is None, tolerance, seed, allow_different) for old, new in pairs
    ]
    if output is not None:
        write_json(output, {"changes": [change.to_json() for change in changes]})
    for change in changes:
        Console(width=_TABLE_WIDTH).print(change_table(change))
        for note in change.notes:
            typer.echo(f"note: {note}")
    if changed is not None:
        typer.echo(_TWO_RUNS)
    for change in changes:
        change.require_not_slower()
