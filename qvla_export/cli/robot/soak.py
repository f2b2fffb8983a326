"""`qvla soak`: a server and a control loop under attack for hours."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import JsonOption, SeedOption
from qvla_export.cli.progress import print_json, progress_shown
from qvla_export.cli.robot.serve_options import TlsCertOption, TlsKeyOption

if TYPE_CHECKING:
    from qvla_export.pipeline.soak.report import SoakReport, Tallies

# Wide enough wherever nobody looks at a terminal.
_TABLE_WIDTH = 120


def soak(
    hours: Annotated[float, typer.Option(help="How long; memory is judged from 0.1 on.")] = 1.0,
    seed: SeedOption = 0,
    tls_cert: TlsCertOption = None,
    tls_key: TlsKeyOption = None,
    output: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Attack a server and a control loop of this machine, and count what came of it.

    Good clients ask in every protocol while others are slow, leave, send half or mutated requests
    or costly ones; the engine fails, the disk is full, server and driver are stopped. Exit 1 where
    a promise of docs/security.md was broken.
    """
    from qvla_export.cli.robot.serve import tls_files
    from qvla_export.pipeline.soak.soak import SoakPlan, run_soak

    plan = SoakPlan(hours, seed, tls_files(tls_cert, tls_key, None))
    with progress_shown() as on_progress:
        report = run_soak(plan, on_progress)
    if output is not None:
        report.save(output)
    if as_json:
        print_json(report.to_json())
    else:
        _print(report)
    if not report.ok:
        raise typer.Exit(1)


def _print(report: "SoakReport") -> None:
    console = Console(width=_TABLE_WIDTH)
    console.print(_table("good clients", report.good))
    console.print(_table(f"attackers ({report.attacker})", report.attacks))
    for promise in report.promises:
        word = {True: "held", False: "BROKEN", None: "not judged"}[promise.holds]
        typer.echo(f"{word}: {promise.text} ({promise.figure})")
    typer.echo(
        f"soak: {report.hours:.3f} hours, seed {report.seed}, "
        f"{'all promises held' if report.ok else 'a promise was broken'}"
    )


def _table(title: str, tallies: "Tallies") -> Table:
    from qvla_export.pipeline.soak.report import percentiles_ms

    table = Table(title=title)
    for column in ("phase", "protocol", "sent", "answered", "refused", "wrong", "p50 ms", "p99 ms"):
        table.add_column(column, justify="left" if column in ("phase", "protocol") else "right")
    for (phase, protocol), tally in tallies.items():
        times = percentiles_ms(tally)
        table.add_row(
            *(phase, protocol, f"{tally.sent:,}", f"{tally.answered:,}"),
            ", ".join(f"{count:,} {reason}" for reason, count in tally.refused.most_common()),
            ", ".join(f"{count:,} {reason}" for reason, count in tally.wrong.most_common(3)),
            *(("", "") if times is None else (f"{value:.1f}" for value in times)),
        )
    return table
