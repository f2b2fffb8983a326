"""`qvla build`: a bundle's TensorRT engines, on the device."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import BundleArgument, JsonOption
from qvla_export.cli.progress import print_json, progress_shown

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.trt.sidecar import Sidecar
    from qvla_export.pipeline.build import BuiltEngines


def build(
    bundle: BundleArgument,
    target: Annotated[
        str | None, typer.Option(help="Refuse a bundle that was made for another target.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder of the engines; default: engines/<target> beside.")
    ] = None,
    workspace_mb: Annotated[
        int, typer.Option(min=1, help="Scratch memory of the builder, MB.")
    ] = 4096,
    level: Annotated[
        int, typer.Option(min=0, max=5, help="Builder effort; more is slower to build.")
    ] = 3,
    timing_cache: Annotated[
        Path | None,
        typer.Option(help="Keep kernel timings in this file, so that builds repeat (tensorrt)."),
    ] = None,
    prompt_min: Annotated[int, typer.Option(min=1, help="Shortest prompt, tokens.")] = 2,
    prompt_opt: Annotated[
        int | None,
        typer.Option(min=1, help="Prompt it is fastest at, tokens; default 32 within the others."),
    ] = None,
    prompt_max: Annotated[int, typer.Option(min=1, help="Longest prompt, tokens.")] = 256,
    as_json: JsonOption = False,
) -> None:
    """Build a bundle's TensorRT engines, on the device; an interrupted build goes on.

    An RTX target builds without a GPU as well. Where the GPU is, the engines are verified.
    """
    from engines.trt.builder import BuildSettings
    from engines.trt.shapes import PromptRange
    from qvla_export.pipeline.build import build as build_bundle_engines
    from qvla_export.pipeline.build import require_target
    from qvla_export.shared.bundle import Bundle

    loaded = Bundle.load(bundle)
    if target is not None:
        require_target(loaded, target)
    settings = BuildSettings(
        prompt=PromptRange(
            prompt_min, prompt_opt or max(prompt_min, min(32, prompt_max)), prompt_max
        ),
        workspace_bytes=workspace_mb << 20,
        level=level,
        timing_cache=timing_cache,
    )
    with progress_shown() as on_progress:
        built = build_bundle_engines(loaded, output, settings, on_progress)
    if as_json:
        print_json(built.to_json())
        return
    Console().print(_table(built.sidecars))
    typer.echo(f"engines: {built.nbytes / 1e6:.2f} MB -> {built.folder}")
    typer.echo(_verdict(built))


def _verdict(built: "BuiltEngines") -> str:
    verdict = built.verdict
    if verdict is None:
        return (
            "not verified: this machine has no NVIDIA GPU; on the device run qvla build, "
            f"then qvla verify {built.bundle}"
        )
    return (
        f"verified: cosine {verdict.drift.cosine:.6f}, largest difference "
        f"{verdict.drift.worst:.1e} (normalized) on {verdict.drift.observations} observations"
    )


def _table(sidecars: "Sequence[Sidecar]") -> Table:
    first = sidecars[0].origin
    table = Table(title=f"{first.module} {first.module_version} for {first.compute_capability}")
    for column in ("part", "engine, MB", "weights, MB"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for sidecar in sidecars:
        weights = "" if sidecar.weights_bytes is None else f"{sidecar.weights_bytes / 1e6:.3f}"
        table.add_row(sidecar.origin.part, f"{sidecar.engine_bytes / 1e6:.3f}", weights)
    return table
