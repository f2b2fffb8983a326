"""`qvla doctor`: each wrong setting of this machine, with the command that mends it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qvla_export.cli.options import JsonOption, PresetOption, UnnormKeyOption, with_columns
from qvla_export.cli.progress import print_json
from qvla_export.pipeline.data_source import USUAL_COLUMNS, ColumnOptions

if TYPE_CHECKING:
    from qvla_export.pipeline.robot.doctor import Examination

_FAILED = 2
_STYLES = {"error": "red", "warning": "yellow", "unknown": "cyan", "ok": "green"}


@with_columns
def doctor(
    place: Annotated[
        Path | None, typer.Argument(help="Bundle folder that is to run, or checkpoint folder.")
    ] = None,
    engines: Annotated[
        Path | None, typer.Option(help="Folder of its engines; default engines/<target> beside.")
    ] = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Checkpoint folder, beside a bundle.")
    ] = None,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    dataset: Annotated[
        Path | None, typer.Option(help="Demonstrations whose columns are checked.")
    ] = None,
    columns: ColumnOptions = USUAL_COLUMNS,
    libero: Annotated[
        bool, typer.Option("--libero", help="Check LIBERO's versions though it is not installed.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address the server is to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its TCP port.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="Its token's file.")] = None,
    strict: Annotated[bool, typer.Option(help="Fail on warnings as well.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Name each wrong setting of this machine with the command that mends it.

    Exits with 2 if there is an error (the policy does not run, or acts wrongly), with 0 otherwise.
    """
    from jetson.doctor.examination import DoctorRequest
    from qvla_export.pipeline.robot.doctor import examine_machine, looks_like_checkpoint
    from qvla_export.shared.errors import QvlaError

    bundle = place
    if place is not None and looks_like_checkpoint(place):
        if checkpoint is not None:
            raise QvlaError(f"two checkpoints to look at, {place} and {checkpoint}; name one")
        bundle, checkpoint = None, place

    request = DoctorRequest(
        bundle, engines, checkpoint, unnorm_key, preset, libero, host, port, token_file
    )
    examination = examine_machine(request, dataset, columns)
    if as_json:
        print_json(examination.to_json())
    else:
        _print(examination)
    counts = examination.counts
    if counts["error"] or (strict and counts["warning"]):
        raise typer.Exit(_FAILED)


def _print(examination: "Examination") -> None:
    """Print what is wrong with its remedies, then what is right, then what was not looked at."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from jetson.doctor.finding import sort_findings

    findings = sort_findings(examination.findings)
    table = Table("", "setting")
    for column in ("here", "should be"):
        table.add_column(column, overflow="fold")
    left_out = []
    for finding in findings:
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
    for finding in findings:
        if finding.remedy:
            typer.echo(f"{finding.severity}: {finding.what}\n    {finding.remedy}")
    typer.echo("not applicable here:\n" + "\n".join(left_out))
    counts = examination.counts.items()
    typer.echo("doctor: " + ", ".join(f"{number} {name}" for name, number in counts))
