"""Time, memory and gap of the allocators on a random table of a published policy's size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.shared.artifacts import versions
from qvla_export.shared.tables.text_table import TextTable

if TYPE_CHECKING:
    from qvla_export.allocation.allocate import Budget
    from qvla_export.allocation.benchmark import AllocationFigures


@dataclass(frozen=True)
class AllocationComparison:
    """What each method took and reached under one budget."""

    geometry: str
    budget: "Budget"
    methods: "tuple[AllocationFigures, ...]"

    def to_json(self) -> dict[str, Any]:
        """Return figures and versions as JSON values."""
        rows = [{**asdict(figures), "gap": figures.gap} for figures in self.methods]
        figures = {"geometry": self.geometry, "budget": self.budget.to_json(), "methods": rows}
        return {**figures, "versions": versions()}

    def table(self) -> TextTable:
        """Return a row for each method, for a terminal."""
        columns = ("method", "channels", "seconds, best", "worst", "peak memory", "above bound")
        return TextTable(columns, title=f"{self.geometry}, {self.budget}").with_rows(
            (
                figures.method,
                f"{figures.channels:,}",
                f"{min(figures.seconds):.2f}",
                f"{max(figures.seconds):.2f}",
                f"{figures.peak_bytes / 1e6:.0f} MB",
                f"{figures.gap:.2g}",
            )
            for figures in self.methods
        )


def bench_allocation(
    geometry: str,
    methods: Sequence[str],
    bits: float,
    target: str,
    rounds: int = 3,
    on_progress: OnProgress = ignore,
) -> AllocationComparison:
    """Allocate by each method, in a process of its own each.

    Args:
        geometry: name of a published size.
        methods: names of allocators.
        bits: budget, mean bits per channel.
        target: whose containers count.
        rounds: allocations of each method.
        on_progress: hears of every method.

    Raises:
        QvlaError: geometry, method or target are unknown.
    """
    from engines.targets import find_target
    from qvla_export.allocation.allocate import Budget
    from qvla_export.allocation.benchmark import AllocationBench, measure_allocation

    budget, device = Budget("bits per channel", bits), find_target(target)
    report = bar(on_progress, "methods")
    figures: list[AllocationFigures] = []
    for method in methods:
        bench = AllocationBench(geometry, method, budget, device, rounds)
        figures.append(measure_allocation(bench))
        report(len(figures), len(methods))
    return AllocationComparison(geometry, budget, tuple(figures))
