"""`qvla report`: one page about a run."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import A_FILE, A_RUN


def report(
    run: Annotated[Path, typer.Argument(help="Run folder.", callback=A_RUN.require)],
    robot: Annotated[
        list[Path] | None,
        typer.Option(
            help="File of qvla robot profile, shown beside predictions; repeat.",
            callback=A_FILE.require,
        ),
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run."""
    from qvla_export.pipeline.robot.run_report import report_run

    typer.echo(f"report: {report_run(run, robot or ())}")
