"""`qvla doctor`: each wrong setting of this machine, with the command that mends it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from qvla_export.cli.options import DatasetOption, PresetOption, UnnormKeyOption
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from jetson.doctor.finding import BoardFinding
    from jetson.doctor.observations import DatasetFacts

FORMAT = "qvla.doctor/1"
_FAILED = 2
_STYLES = {"error": "red", "warning": "yellow", "unknown": "cyan", "ok": "green"}


def doctor(
    bundle: Annotated[Path | None, typer.Argument(help="Bundle folder that is to run.")] = None,
    engines: Annotated[
        Path | None, typer.Option(help="Folder of its engines; default engines/<target> beside.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder whose statistics are to be checked.")
    ] = None,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    dataset: DatasetOption = None,
    libero: Annotated[
        bool, typer.Option("--libero", help="Check LIBERO's versions though it is not installed.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address the server is to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its TCP port.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="Its token's file.")] = None,
    strict: Annotated[bool, typer.Option(help="Fail on warnings as well.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print every finding as JSON.")] = False,
) -> None:
    """Name each wrong setting of this machine with the command that mends it.

    Exits with 2 if there is an error (the policy does not run, or acts wrongly), with 0 otherwise.
    """
    from jetson.doctor.examination import DoctorRequest, examine, read_subject
    from jetson.doctor.finding import count

    question = DoctorRequest(
        bundle, engines, checkpoint, unnorm_key, preset, libero, host, port, token_file
    )
    facts = None if dataset is None else _dataset_facts(dataset)
    findings = examine(question, read_subject(question, dataset=facts))
    if as_json:
        typer.echo(_json(findings))
    else:
        _print(findings)
    if count(findings, "error") or (strict and count(findings, "warning")):
        raise typer.Exit(_FAILED)


def _dataset_facts(path: Path) -> "DatasetFacts":
    """Return a data set's columns; or why it, or the library for it, is not there."""
    from jetson.doctor.observations import DatasetFacts

    try:
        from calibration.sources.lerobot import LeRobotDataset
    except ImportError as error:
        return DatasetFacts(path, f"{error.name} is not installed", "pip install 'qvla[host]'")
    try:
        opened = LeRobotDataset(path)
        state, action = opened.keys.state, opened.keys.action
        return DatasetFacts(
            path,
            frames=len(opened),
            cameras=dict(opened.keys.images),
            state_dim=_size(opened.features[state]) if state else 0,
            action_dim=_size(opened.features[action]),
        )
    except (QvlaError, OSError, KeyError, TypeError, ValueError) as error:
        return DatasetFacts(path, " ".join(str(error).split()) or type(error).__name__)


def _size(feature: object) -> int:
    shape = feature.get("shape") if isinstance(feature, dict) else None
    return int(shape[0]) if shape else 0


def _json(findings: "Sequence[BoardFinding]") -> str:
    from jetson.doctor.finding import SEVERITIES, count

    counts = {severity: count(findings, severity) for severity in SEVERITIES}
    shown = [finding.to_json() for finding in findings]
    return json.dumps({"format": FORMAT, "counts": counts, "findings": shown}, indent=1)


def _print(findings: "Sequence[BoardFinding]") -> None:
    """Print what is wrong with its remedies, then what is right, then what was not looked at."""
    from jetson.doctor.finding import SEVERITIES, count, sort_findings

    table = Table("", "setting")
    for column in ("here", "should be"):
        table.add_column(column, overflow="fold")
    left_out = []
    for finding in sort_findings(findings):
        if finding.severity == "not applicable":
            left_out.append(f"  {finding.what}: {finding.observed}")
            continue
        observed, wanted = escape(finding.observed), ""
        if finding.severity != "ok":
            observed += f"\n[dim]{escape(finding.why)}[/]"
            wanted = escape(finding.wanted)
        style = _STYLES[finding.severity]
        table.add_row(f"[{style}]{finding.severity}[/]", finding.what, observed, wanted)
    Console().print(table)
    # Not in the table: a command is copied as one line.
    for finding in sort_findings(findings):
        if finding.remedy:
            typer.echo(f"{finding.severity}: {finding.what}\n    {finding.remedy}")
    typer.echo("not applicable here:\n" + "\n".join(left_out))
    counts = {severity: count(findings, severity) for severity in SEVERITIES}
    typer.echo("doctor: " + ", ".join(f"{number} {name}" for name, number in counts.items()))
