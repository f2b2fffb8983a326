"""Commands about engines: build them, and say how large they really are."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from qvla_export.cli.verify import require_target
from qvla_export.shared.artifacts import versions, write_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from engines.trt.builder import BuildSettings
    from engines.trt.sidecar import Sidecar
    from engines.trt.sizes import BundleSizes
    from qvla_export.shared.bundle import Bundle

_SIZES_FORMAT = "qvla.sizes/1"


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(build)
    app.command()(sizes)


def build(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
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
) -> None:
    """Build a bundle's TensorRT engines, on the device; an interrupted build goes on.

    An RTX target builds without a GPU as well. Where the GPU is, the engines are verified.
    """
    from engines.trt.builder import BuildSettings
    from engines.trt.shapes import PromptRange
    from engines.trt.sidecar import engine_folder
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
    folder = engine_folder(loaded) if output is None else output
    built = build_with_progress(loaded, folder, settings)
    Console().print(_build_table(built))
    typer.echo(f"engines: {sum(s.engine_bytes for s in built) / 1e6:.2f} MB -> {folder}")
    _verify(loaded, folder)


def sizes(
    bundles: Annotated[list[Path], typer.Argument(help="Bundle folders.")],
    output: Annotated[Path | None, typer.Option("--output", help="The same as JSON.")] = None,
) -> None:
    """Compare the bytes a plan promises with those of the graph and of the TensorRT engine.

    Engines are built if they are not there and can be built on this machine.
    """
    from engines.trt.sizes import measure_sizes
    from qvla_export.shared.bundle import Bundle

    measured = []
    for path in bundles:
        loaded = Bundle.load(path)
        measured.append(measure_sizes(loaded, *_engines_or_why_not(loaded)))
    Console().print(_sizes_table(measured))
    for found in measured:
        if found.engine_missing:
            typer.echo(f"{found.name}: no engine: {found.engine_missing}")
    if output is not None:
        report = {"format": _SIZES_FORMAT, "bundles": [found.to_json() for found in measured]}
        write_json(output, {**report, "versions": versions()})


def build_with_progress(
    bundle: "Bundle", folder: Path, settings: "BuildSettings | None" = None
) -> "tuple[Sidecar, ...]":
    """Build a bundle's engines behind a progress bar; see `build_engines`."""
    from engines.trt.builder import build_engines

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(f"{len(bundle.parts)} stages", total=None)

        def on_progress(stage: str, phase: str, done: int, steps: int) -> None:
            progress.update(task, description=f"{stage}: {phase}", completed=done, total=steps)

        return build_engines(bundle, folder, settings, on_progress)


def _verify(bundle: "Bundle", folder: Path) -> None:
    """Verify new engines at once where they can run."""
    from engines.load import load_engine
    from engines.trt.gpu import find_gpu
    from engines.verify import judge

    if find_gpu() is None:
        typer.echo(
            f"not verified: this machine has no NVIDIA GPU; on the device run qvla build, "
            f"then qvla verify {bundle.path}"
        )
        return
    with load_engine(bundle, engines=folder) as engine:
        verdict = judge(bundle, engine)
    verdict.require_passed()
    typer.echo(
        f"verified: cosine {verdict.drift.cosine:.6f}, largest difference "
        f"{verdict.drift.worst:.1e} (normalized) on {verdict.drift.observations} observations"
    )


def _engines_or_why_not(bundle: "Bundle") -> "tuple[tuple[Sidecar, ...] | None, str | None]":
    from engines.targets import find_target
    from engines.trt.modules import BuildError, is_tensorrt
    from engines.trt.sidecar import engine_folder

    target = find_target(bundle.target)
    if not is_tensorrt(target):
        return None, f"{target.runtime} runs the bundle itself"
    try:
        return build_with_progress(bundle, engine_folder(bundle)), None
    except BuildError as error:
        return None, str(error)


def _sizes_table(measured: "Sequence[BundleSizes]") -> Table:
    table = Table(title="weights, MB (1e6 bytes)")
    for column in ("bundle", "target", "plan", "graph", "engine", "off", "engine file", "/ FP16"):
        table.add_column(column, justify="left" if column in ("bundle", "target") else "right")
    for found in measured:
        error = found.engine_error
        table.add_row(
            found.name,
            found.target,
            _megabytes(found.planned_bytes),
            _megabytes(found.onnx_bytes),
            _megabytes(found.engine_weight_bytes),
            "" if error is None else f"{error:+.1%}",
            _megabytes(found.engine_bytes),
            f"{found.ratio:.3f}",
        )
    return table


def _megabytes(nbytes: int | None) -> str:
    return "" if nbytes is None else f"{nbytes / 1e6:.3f}"


def _build_table(sidecars: "Sequence[Sidecar]") -> Table:
    first = sidecars[0].origin
    table = Table(title=f"{first.module} {first.module_version} for {first.compute_capability}")
    for column in ("stage", "engine, MB", "weights, MB"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for sidecar in sidecars:
        weights = "" if sidecar.weights_bytes is None else f"{sidecar.weights_bytes / 1e6:.3f}"
        table.add_row(sidecar.origin.stage, f"{sidecar.engine_bytes / 1e6:.3f}", weights)
    return table
