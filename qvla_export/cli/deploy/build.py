"""`qvla build`: a bundle's TensorRT engines, on the device."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import BundleArgument, JsonOption
from qvla_export.cli.progress import print_result, progress_shown


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
    print_result(built, built.texts(), as_json)
