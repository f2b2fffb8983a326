"""`qvla compare-latency`: what changed between two latencies, and whether that is noise."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import A_LATENCY, JsonOption
from qvla_export.cli.progress import WIDE, print_json, print_texts


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
    from jetson.latency.latency_texts import change_texts
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
        print_texts(change_texts(changes, two_runs=changed is not None), WIDE)
    for change in changes:
        change.require_not_slower()
