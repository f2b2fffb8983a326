"""`qvla bench allocation`: time, memory and gap of the allocators at a published policy's size."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import TargetOption
from qvla_export.shared.artifacts import versions, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from qvla_export.allocation.benchmark import AllocationFigures


def allocation(
    geometry: Annotated[str, typer.Option(help="Published size.")] = "openvla-7b",
    methods: Annotated[
        str, typer.Option(help="Comma-separated allocators.")
    ] = "hull,algorithm1,staged,gates,per-layer,per-module,uniform",
    bits: Annotated[float, typer.Option(help="Mean bits per channel.")] = 4.0,
    rounds: Annotated[int, typer.Option(min=1, help="Allocations of each method.")] = 3,
    target: TargetOption = "cpu",
    output: Annotated[Path | None, typer.Option(help="Figures as JSON.")] = None,
) -> None:
    """Allocate a random table of a published policy's size by each method."""
    from engines.targets import find_target
    from qvla_export.allocation.allocate import Budget
    from qvla_export.allocation.benchmark import AllocationBench, measure_allocation

    budget, device = Budget("bits per channel", bits), find_target(target)
    found = []
    for method in methods.split(","):
        wanted = AllocationBench(geometry, method.strip(), budget, device, rounds)
        found.append(measure_allocation(wanted))
    if output is not None:
        rows = [{**asdict(figures), "gap": figures.gap} for figures in found]
        figures = {"geometry": geometry, "budget": budget.to_json(), "methods": rows}
        write_json(output, {**figures, "versions": versions()})
    Console().print(_table(found, f"{geometry}, {budget}"))


def _table(found: "Sequence[AllocationFigures]", title: str) -> Table:
    table = Table(title=title)
    for column in ("method", "channels", "seconds, best", "worst", "peak memory", "above bound"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for figures in found:
        table.add_row(
            figures.method,
            f"{figures.channels:,}",
            f"{min(figures.seconds):.2f}",
            f"{max(figures.seconds):.2f}",
            f"{figures.peak_bytes / 1e6:.0f} MB",
            f"{figures.gap:.2g}",
        )
    return table
