"""`qvla check`: a bundle or graph against what a target documents, without running it."""

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.artifacts import write_json

if TYPE_CHECKING:
    from engines.check.finding import Finding

# What is shown of a rule that many nodes break alike.
_NAMED = 2
_FAILED = 2


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(check)


def check(
    graph: Annotated[Path, typer.Argument(help="Bundle folder, or a bare .onnx file.")],
    target: Annotated[str, typer.Option("--target", help="Target whose rules it must keep.")],
    output: Annotated[
        Path | None, typer.Option("--json", help="Write every finding to this JSON file.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Fail on warnings as well.")] = False,
) -> None:
    """Check a graph against a target's documented rules; exit 2 if it breaks one."""
    from dataclasses import asdict

    from engines.check.bundle import check_path
    from engines.check.finding import errors
    from engines.targets import find_target

    device = find_target(target)
    findings = check_path(graph, device)
    if findings:
        Console().print(_table(findings))
    failed = len(errors(findings))
    typer.echo(
        f"check: {failed} errors, {len(findings) - failed} warnings for target {device.name} "
        f"in {graph}"
    )
    if output is not None:
        content = {
            "target": device.name,
            "graph": str(graph),
            "errors": failed,
            "findings": [asdict(finding) for finding in findings],
        }
        write_json(output, content)
        typer.echo(f"findings: {output}")
    if failed or (strict and findings):
        raise typer.Exit(_FAILED)


def _table(findings: "tuple[Finding, ...]") -> Table:
    """One row a rule and stage: how often, where first, and why."""
    table = Table("severity", "rule", "stage", "nodes", "first", "what", "source")
    counts = Counter((finding.rule, finding.stage) for finding in findings)
    first: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings:
        first.setdefault((finding.rule, finding.stage), []).append(finding)
    for (rule, stage), group in sorted(first.items(), key=lambda item: item[1][0].severity):
        shown = group[0]
        nodes = ", ".join(finding.node or "the graph" for finding in group[:_NAMED])
        count = str(counts[rule, stage])
        table.add_row(shown.severity, rule, stage, count, nodes, shown.message, shown.source)
    return table
