"""The noun `GraphFinding`: one place of a graph that breaks one rule of a target."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qvla_export.shared.errors import QvlaError

# "error": the graph will not parse or build; where that is not known, because the runtime builds on
# its device alone, also what its documents forbid.
# "warning": it builds, and no document promises the kernel, or that it computes what is meant.
Severity = Literal["error", "warning"]


@dataclass(frozen=True)
class Rule:
    """A rule of a target and where it is written down."""

    # Dotted name, its group first: "quantization.symmetric".
    name: str
    severity: Severity
    # Document and version, or what was measured.
    source: str
    # Whether TensorRT for RTX builds every such graph all the same (1.7.1, measured 2026-11):
    # there it is a warning.
    rtx_builds: bool = False


@dataclass(frozen=True)
class GraphFinding:
    """One place of a graph that breaks one rule."""

    rule: str
    severity: Severity
    # Name of the bundle's part; the file's stem for a bare graph.
    part: str
    # Name of the node or constant and its operator; empty for the graph as a whole.
    node: str
    op: str
    # The rule, the value found and the remedy.
    message: str
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values; there a part is called a stage."""
        fields = asdict(self)
        return {"stage" if name == "part" else name: value for name, value in fields.items()}


class CheckFailed(QvlaError):
    """A graph breaks a rule of its target."""


def errors(findings: Iterable[GraphFinding]) -> tuple[GraphFinding, ...]:
    """Return the findings that are errors."""
    return tuple(finding for finding in findings if finding.severity == "error")


def require_no_errors(findings: Iterable[GraphFinding]) -> None:
    """Refuse findings of severity "error".

    Raises:
        CheckFailed: with the first three, one of each rule first.
    """
    first: dict[str, GraphFinding] = {}
    failed = errors(findings)
    for finding in failed:
        first.setdefault(finding.rule, finding)
    if failed:
        shown = "; ".join(
            f"{f.part}/{f.node or 'graph'} [{f.rule}] {f.message}" for f in list(first.values())[:3]
        )
        raise CheckFailed(f"{len(failed)} errors of {sorted(first)}: {shown}")
