"""`qvla report`: one page about a run."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import A_RUN


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", callback=A_RUN.require)],
) -> None:
    """Write one self-contained HTML page about a run."""
    from qvla_export.report.page import write_report

    typer.echo(f"report: {write_report(run)}")
