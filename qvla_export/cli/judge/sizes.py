"""`qvla sizes`: the bytes a plan promises beside those of the graph and of the engine."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import A_BUNDLE, JsonOption
from qvla_export.cli.progress import print_result, progress_shown


def sizes(
    bundles: Annotated[
        list[Path], typer.Argument(help="Bundle folders.", callback=A_BUNDLE.require)
    ],
    output: Annotated[Path | None, typer.Option("--output", help="The same as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the bytes a plan promises with those of the graph and of the TensorRT engine.

    Engines are built if they are not there and can be built on this machine.
    """
    from qvla_export.pipeline.sizes import compare_sizes

    with progress_shown() as on_progress:
        report = compare_sizes(bundles, on_progress)
    if output is not None:
        report.save(output)
    print_result(report, report.texts(), as_json)
