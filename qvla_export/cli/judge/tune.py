"""`qvla tune`: the form in which each bundle runs fastest on this machine."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import A_BUNDLE, JsonOption, ThreadsOption
from qvla_export.cli.progress import print_result, progress_shown


def tune(
    bundles: Annotated[
        list[Path],
        typer.Argument(
            help="Bundles; others are compared with a float one.", callback=A_BUNDLE.require
        ),
    ],
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=2, help="Actions of each form.")] = 30,
    bytes_share: Annotated[
        float, typer.Option(help="Most bytes of weights in memory, as a share of float's.")
    ] = 0.6,
    clock: Annotated[
        Literal["wall", "cpu"], typer.Option(help="cpu: comparable on a busy machine; one thread.")
    ] = "wall",
    output: Annotated[Path | None, typer.Option("--output", help="The same as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Choose runtime and form of weights, layer by layer, by what is fastest here.

    The choice is kept beside the bundle, for serve, run, verify and profile on this machine.
    """
    from engines.forms.tune import TuningSettings
    from qvla_export.pipeline.bench.tune import tune_bundles

    settings = TuningSettings(threads, rounds, byte_share=bytes_share, clock=clock)
    with progress_shown() as on_progress:
        report = tune_bundles(bundles, settings, output, on_progress)
    print_result(report, report.lines(), as_json)
