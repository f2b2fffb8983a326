"""`qvla sizes`: the bytes a plan promises beside those of the graph and of the engine."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import A_BUNDLE
from qvla_export.shared.artifacts import versions, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.trt.sizes import BundleSizes

_SIZES_FORMAT = "qvla.sizes/1"


def sizes(
    bundles: Annotated[
        list[Path], typer.Argument(help="Bundle folders.", callback=A_BUNDLE.require)
    ],
    output: Annotated[Path | None, typer.Option("--output", help="The same as JSON.")] = None,
) -> None:
    """Compare the bytes a plan promises with those of the graph and of the TensorRT engine.

    Engines are built if they are not there and can be built on this machine.
    """
    from engines.trt.sizes import measure_sizes
    from qvla_export.pipeline.build import engines_or_why_not
    from qvla_export.shared.bundle import Bundle

    measured = []
    for path in bundles:
        loaded = Bundle.load(path)
        measured.append(measure_sizes(loaded, *engines_or_why_not(loaded)))
    Console().print(_sizes_table(measured))
    for found in measured:
        if found.engine_missing:
            typer.echo(f"{found.name}: no engine: {found.engine_missing}")
    if output is not None:
        report = {"format": _SIZES_FORMAT, "bundles": [found.to_json() for found in measured]}
        write_json(output, {**report, "versions": versions()})


def _sizes_table(measured: "Sequence[BundleSizes]") -> Table:
    table = Table(title="weights, MB (1e6 bytes)")
    for column in ("bundle", "target", "plan", "graph", "engine", "off", "engine file", "/ FP16"):
        table.add_column(column, justify="left" if column in ("bundle", "target") else "right")
    for found in measured:
        error = found.engine_error
        table.add_row(
            found.name,
            found.target,
            _megabytes(found.planned_bytes),
            _megabytes(found.onnx_bytes),
            _megabytes(found.engine_weight_bytes),
            "" if error is None else f"{error:+.1%}",
            _megabytes(found.engine_bytes),
            f"{found.ratio:.3f}",
        )
    return table


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.3f}"
