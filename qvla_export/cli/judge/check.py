"""`qvla check`: a bundle or graph against what a target documents, without running it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvla_export.cli.options import A_GRAPH, JsonOption
from qvla_export.cli.progress import print_json

if TYPE_CHECKING:
    from rich.table import Table

    from engines.check.finding import GraphFinding

_FAILED = 2


def check(
    graph: Annotated[
        Path,
        typer.Argument(help="Bundle folder, or a bare .onnx file.", callback=A_GRAPH.require),
    ],
    target: Annotated[
        str | None,
        typer.Option("--target", help="Target whose rules it must keep; default a bundle's own."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", help="Write every finding to this JSON file.")
    ] = None,
    strict: Annotated[bool, typer.Option(help="Fail on warnings as well.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check a graph against a target's documented rules; exit 2 if it breaks one."""
    from qvla_export.pipeline.check import check_graph

    report = check_graph(graph, target)
    if output is not None:
        report.save(output)
    if as_json:
        print_json(report.to_json())
    else:
        if report.findings:
            from rich.console import Console

            Console().print(_table(report.findings))
        typer.echo(
            f"check: {report.errors} errors, {len(report.findings) - report.errors} warnings for "
            f"target {report.target} in {graph}"
        )
        if output is not None:
            typer.echo(f"findings: {output}")
    if report.errors or (strict and report.findings):
        raise typer.Exit(_FAILED)


def _table(findings: "tuple[GraphFinding, ...]") -> "Table":
    """Return one row a rule and part, errors first: how often, where first, and why."""
    from rich.markup import escape
    from rich.table import Table

    table = Table("rule", show_lines=True)
    table.add_column("where", overflow="fold", max_width=26)
    table.add_column("what")
    groups: dict[tuple[str, str], list[GraphFinding]] = {}
    for finding in findings:
        groups.setdefault((finding.rule, finding.part), []).append(finding)
    for group in sorted(groups.values(), key=lambda group: group[0].severity):
        first = group[0]
        style = "red" if first.severity == "error" else "yellow"
        count = f" and {len(group) - 1} more" if len(group) > 1 else ""
        table.add_row(
            f"[{style}]{first.severity}[/]\n{first.rule.replace('.', '.' + chr(10), 1)}",
            escape(f"{first.part}\n{first.node or 'the graph'}{count}"),
            f"{escape(first.message)}\n[dim]{escape(first.source)}[/]",
        )
    return table
