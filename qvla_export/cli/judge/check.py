"""`qvla check`: a bundle or graph against what a target documents, without running it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qvla_export.cli.options import A_GRAPH
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from engines.check.finding import GraphFinding

_FAILED = 2


def check(
    graph: Annotated[
        Path, typer.Argument(help="Bundle folder, or a bare .onnx file.", callback=A_GRAPH.require)
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", help="Target whose rules it must keep; default a bundle's own."),
    ] = None,
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

    device = find_target(_target_of(graph) if target is None else target)
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


def _target_of(graph: Path) -> str:
    """Return the target a bundle states; a bare graph has none."""
    from qvla_export.shared.bundle import Bundle

    if graph.is_file():
        raise QvlaError(f"{graph} is a bare graph and has no target of its own; name one: --target")
    return Bundle.load(graph).target


def _table(findings: "tuple[GraphFinding, ...]") -> Table:
    """One row a rule and stage, errors first: how often, where first, and why."""
    table = Table("rule", show_lines=True)
    table.add_column("where", overflow="fold", max_width=26)
    table.add_column("what")
    groups: dict[tuple[str, str], list[GraphFinding]] = {}
    for finding in findings:
        groups.setdefault((finding.rule, finding.stage), []).append(finding)
    for group in sorted(groups.values(), key=lambda group: group[0].severity):
        shown = group[0]
        style = "red" if shown.severity == "error" else "yellow"
        count = f" and {len(group) - 1} more" if len(group) > 1 else ""
        table.add_row(
            f"[{style}]{shown.severity}[/]\n{shown.rule.replace('.', '.' + chr(10), 1)}",
            escape(f"{shown.stage}\n{shown.node or 'the graph'}{count}"),
            f"{escape(shown.message)}\n[dim]{escape(shown.source)}[/]",
        )
    return table
