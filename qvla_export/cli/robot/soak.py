"""`qvla soak`: a server and a control loop under attack for hours."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import JsonOption, SeedOption
from qvla_export.cli.progress import WIDE, print_result, progress_shown
from qvla_export.cli.robot.serve_options import TlsCertOption, TlsKeyOption


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
    from qvla_export.pipeline.soak.soak_texts import soak_texts

    plan = SoakPlan(hours, seed, tls_files(tls_cert, tls_key, None))
    with progress_shown() as on_progress:
        report = run_soak(plan, on_progress)
    if output is not None:
        report.save(output)
    print_result(report, soak_texts(report), as_json, WIDE)
    if not report.ok:
        raise typer.Exit(1)
