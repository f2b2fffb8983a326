"""`qvla bench size`: a policy of a published size through export, engines and one action."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import JsonOption
from qvla_export.cli.progress import print_result, progress_shown
from qvla_export.shared.artifacts import write_json


def size(
    work: Annotated[Path, typer.Argument(help="Folder for checkpoint, bundle and engines.")],
    geometry: Annotated[str, typer.Option(help="Published size.")] = "openvla-oft-7b",
    target: Annotated[str, typer.Option(help="Target of bundle and engines.")] = "rtx4070",
    mix: Annotated[
        str, typer.Option(help="Shares of the channels at each width, or float.")
    ] = "8:0.15,4:0.7,0:0.15",
    layers_per_part: Annotated[int, typer.Option(min=1, help="Decoder blocks a part.")] = 1,
    skip_engines: Annotated[
        bool, typer.Option("--skip-engines", help="Build no TensorRT engines.")
    ] = False,
    skip_action: Annotated[
        bool, typer.Option("--skip-action", help="Run no action through ONNX Runtime.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Figures as JSON.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Take a random policy of a published size through every stage; needs tens of GB of disk."""
    from qvla_export.pipeline.bench.size import RealSize, measure_real_size

    request = RealSize(
        work, geometry, target, mix, layers_per_part, not skip_engines, not skip_action
    )
    with progress_shown() as on_progress:
        figures = measure_real_size(request, on_progress)
    if output is not None:
        write_json(output, figures.to_json())
    print_result(figures, [figures.table()], as_json)
