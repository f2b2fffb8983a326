"""`qvla profile`: what an action takes, span by span."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    A_BUNDLE_OR_SERVER,
    A_RECORDING,
    ColdStartsOption,
    JsonOption,
    ThreadsOption,
    WeightsOption,
)
from qvla_export.cli.progress import WIDE, print_result, progress_shown


def profile(
    bundles: Annotated[
        list[str],
        typer.Argument(
            help="Bundles or server URLs; first = baseline.", callback=A_BUNDLE_OR_SERVER.require
        ),
    ],
    samples: Annotated[int, typer.Option(help="Actions of each policy.")] = 200,
    warmup: Annotated[int, typer.Option(help="Actions before the samples.")] = 10,
    recording: Annotated[
        Path | None,
        typer.Option(
            help="MCAP file whose observations are sent; default: blank pictures.",
            callback=A_RECORDING.require,
        ),
    ] = None,
    threads: ThreadsOption = None,
    weights: WeightsOption = "tuned",
    rate: Annotated[
        float | None, typer.Option(help="Commands a second; counts what comes too late.")
    ] = None,
    execute: Annotated[
        int, typer.Option(min=1, help="Commands sent while the next chunk is computed.")
    ] = 1,
    cold_starts: ColdStartsOption = None,
    layers: Annotated[
        bool, typer.Option(help="Time every layer too, in passes of their own.")
    ] = False,
    layer_passes: Annotated[int, typer.Option(min=1, help="Timed passes of --layers.")] = 50,
    export_times: Annotated[
        Path | None,
        typer.Option("--export-times", "--exportTimes", help="Every action, in trtexec's JSON."),
    ] = None,
    export_profile: Annotated[
        Path | None,
        typer.Option("--export-profile", "--exportProfile", help="--layers in trtexec's JSON."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order in which policies take turns.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", help="Latency JSON to write, for compare-latency and the report."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure decode, preprocess, engine, postprocess and encode, policies interleaved."""
    from jetson.latency.latency_texts import profile_texts
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.profile import ProfileRequest, profile_policies
    from qvla_export.shared.latency_statistics import Deadline

    request = ProfileRequest(
        sources=tuple(PolicySource(b, threads=threads, weights=weights) for b in bundles),
        samples=samples,
        warmup=warmup,
        recording=recording,
        deadline=None if rate is None else Deadline(rate, execute),
        layer_passes=layer_passes if layers or export_profile is not None else 0,
        cold_starts=cold_starts,
        export_times=export_times,
        export_layers=export_profile,
        seed=seed,
    )
    with progress_shown() as on_progress:
        comparison = profile_policies(request, output, on_progress)
    print_result(comparison, profile_texts(comparison), as_json, WIDE)
    if output is not None:
        typer.echo(f"latency: {output}", err=as_json)
