"""`qvla robot profile`: what bundles take on this very board, in one file for the host's report."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import A_BUNDLE, JsonOption, ThreadsOption, WeightsOption
from qvla_export.cli.progress import WIDE, print_result, progress_shown


def profile(
    bundles: Annotated[
        list[str], typer.Argument(help="Bundles; first = baseline.", callback=A_BUNDLE.require)
    ],
    output: Annotated[Path, typer.Option(help="The file, for qvla report RUN --robot FILE.")],
    samples: Annotated[int, typer.Option(min=1, help="Actions of each bundle.")] = 1000,
    warmup: Annotated[int, typer.Option(min=0, help="Actions before the samples.")] = 50,
    threads: ThreadsOption = None,
    weights: WeightsOption = "tuned",
    as_is: Annotated[
        bool, typer.Option("--as-is", help="Leave the clocks; else jetson_clocks holds them.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure latency and memory with the clocks held, and record the board meanwhile."""
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.profile import ProfileRequest
    from qvla_export.pipeline.robot.board_profile import RobotProfileRequest, profile_robot

    sources = tuple(PolicySource(b, threads=threads, weights=weights) for b in bundles)
    request = ProfileRequest(sources, samples, warmup, cold_starts=None)
    with progress_shown() as on_progress:
        result = profile_robot(RobotProfileRequest(request, not as_is), output, on_progress)
    print_result(result, result.texts(), as_json, WIDE)
    typer.echo(f"robot's profile: {output}", err=as_json)
