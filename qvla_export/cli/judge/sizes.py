"""`qvla sizes`: the bytes a plan promises beside those of the graph and of the engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import A_BUNDLE, JsonOption
from qvla_export.cli.progress import print_json, progress_shown

if TYPE_CHECKING:
    from collections.abc import Iterable

    from engines.trt.sizes import BundleSizes


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
    if as_json:
        print_json(report.to_json())
        return
    Console().print(_table(report.bundles))
    for bundle in report.bundles:
        if bundle.engine_missing:
            typer.echo(f"{bundle.name}: no engine: {bundle.engine_missing}")


def _table(bundles: "Iterable[BundleSizes]") -> Table:
    table = Table(title="weights, MB (1e6 bytes)")
    for column in ("bundle", "target", "plan", "graph", "engine", "off", "engine file", "/ FP16"):
        table.add_column(column, justify="left" if column in ("bundle", "target") else "right")
    for bundle in bundles:
        error = bundle.engine_error
        table.add_row(
            bundle.name,
            bundle.target,
            _megabytes(bundle.planned_bytes),
            _megabytes(bundle.onnx_bytes),
            _megabytes(bundle.engine_weight_bytes),
            "" if error is None else f"{error:+.1%}",
            _megabytes(bundle.engine_bytes),
            f"{bundle.ratio:.3f}",
        )
    return table


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.3f}"
