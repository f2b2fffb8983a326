"""The step that checks a bundle or graph against what a target documents, without running it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from engines.check.finding import GraphFinding


@dataclass(frozen=True)
class CheckReport:
    """What a graph does that a target's documents do not allow."""

    graph: Path
    # Name of the target.
    target: str
    findings: "tuple[GraphFinding, ...]"

    @property
    def errors(self) -> int:
        """How many findings are errors; the others are warnings."""
        from engines.check.finding import errors

        return len(errors(self.findings))

    def to_json(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "target": self.target,
            "graph": str(self.graph),
            "errors": self.errors,
            "findings": [finding.to_json() for finding in self.findings],
        }

    def save(self, path: Path) -> None:
        """Write JSON, atomically."""
        write_json(path, self.to_json())


def check_graph(graph: Path, target: str | None = None) -> CheckReport:
    """Check a bundle folder or a bare .onnx file against a target's documented rules.

    Args:
        graph: the folder or file.
        target: name of the target; None for the one a bundle states.

    Raises:
        QvlaError: the graph cannot be read, the target is unknown, or a bare graph has none.
    """
    from engines.check.bundle import check_path
    from engines.targets import find_target

    device = find_target(_stated_target(graph) if target is None else target)
    return CheckReport(graph, device.name, check_path(graph, device))


def _stated_target(graph: Path) -> str:
    """Return the target a bundle states; a bare graph has none."""
    from qvla_export.shared.bundle import Bundle

    if graph.is_file():
        raise QvlaError(f"{graph} is a bare graph and has no target of its own; name one: --target")
    return Bundle.load(graph).target
