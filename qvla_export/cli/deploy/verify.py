"""`qvla verify`: an engine against torch or any other engine."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.table import Table

from qvla_export.cli.options import (
    A_BUNDLE,
    A_CALIBRATION,
    A_POLICY,
    BundleArgument,
    JsonOption,
    PresetOption,
    ThreadsOption,
    WeightsOption,
)
from qvla_export.cli.progress import print_json, progress_shown
from qvla_export.shared.artifacts import write_json

if TYPE_CHECKING:
    from engines.drift import ActionDrift
    from qvla_export.pipeline.verify import VerificationReport

_GOLDEN = "golden"
RuntimeName = Literal["auto", "ort"]


def verify(
    bundle: BundleArgument,
    against: Annotated[
        str,
        typer.Option(
            help="golden (torch's stored actions), a bundle, or a checkpoint.",
            callback=replace(A_POLICY, words=(_GOLDEN,)).require,
        ),
    ] = _GOLDEN,
    observations: Annotated[
        str,
        typer.Option(
            help="golden, or a calibration folder: its held-out observations.",
            callback=replace(A_CALIBRATION, words=(_GOLDEN,)).require,
        ),
    ] = _GOLDEN,
    float_bundle: Annotated[
        Path | None,
        typer.Option(
            "--float",
            help="Float bundle of the same policy; its drift is the floor.",
            callback=A_BUNDLE.require,
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Refuse a bundle for another; build its engines if absent.")
    ] = None,
    runtime: Annotated[
        RuntimeName, typer.Option(help="auto: the target's own; ort: ONNX Runtime on the CPU.")
    ] = "auto",
    against_runtime: Annotated[
        RuntimeName, typer.Option(help="Runtime of the bundle of --against: ort or auto.")
    ] = "ort",
    latency: Annotated[bool, typer.Option("--latency", help="Also profile a good engine.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Actions of the latency profile.")] = 200,
    output: Annotated[
        Path | None, typer.Option("--output", help="Report JSON, also of a refused engine.")
    ] = None,
    preset: PresetOption = None,
    threads: ThreadsOption = None,
    weights: WeightsOption = "packed",
    as_json: JsonOption = False,
) -> None:
    """Compare an engine's actions with torch's or another engine's; exit 2 if they differ."""
    from qvla_export.pipeline.verify import Verification
    from qvla_export.pipeline.verify import verify as verify_bundle
    from qvla_export.shared.bundle import Bundle

    request = Verification(
        against,
        observations,
        float_bundle,
        target,
        runtime,
        against_runtime,
        samples if latency else 0,
        preset,
        threads,
        weights,
    )
    with progress_shown() as on_progress:
        report = verify_bundle(Bundle.load(bundle), request, on_progress)
    if output is not None:
        write_json(output, report.to_json())
    if as_json:
        print_json(report.to_json())
    else:
        _say(report)
    report.verdict.require_passed()


def _say(report: "VerificationReport") -> None:
    verdict = report.verdict
    engine = verdict.engine
    typer.echo(
        f"{engine.runtime} ({engine.target}) against {verdict.against}, "
        f"{verdict.drift.observations} {verdict.observations} observations"
    )
    rows = {
        "engine": ("engine against its reference", verdict.drift),
        "action": ("engine against full precision", verdict.action_error),
        "plan": ("its reference against full precision", verdict.plan_error),
        "floor": ("float engine against torch", verdict.float_floor),
    }
    shown = {name: (text, drift) for name, (text, drift) in rows.items() if drift is not None}
    for name, (text, drift) in shown.items():
        typer.echo(f"{name}: {text}: cosine {drift.cosine:.7f}, RMS {drift.rms:.1e}")
    Console().print(_table({name: drift for name, (_, drift) in shown.items()}))
    if report.latency is not None:
        total = report.latency["summary_ms"]["total"]
        where = f"latency on {engine.runtime}"
        p99 = total["p99"]
        worst = f"max {total['max']:.2f} ms" if p99 is None else f"p99 {p99:.2f} ms"
        typer.echo(f"{where}: p50 {total['p50']:.2f} ms, {worst}")
    if verdict.passed:
        typer.echo(f"verified: within {verdict.thresholds.reason}")


def _table(drifts: "dict[str, ActionDrift]") -> Table:
    table = Table(title="|difference| of normalized actions (range 2) and in the robot's units")
    for column in ("", "dimension", "max", "mean", "max, units", "mean, units"):
        table.add_column(column, justify="right" if column else "left")
    for name, drift in drifts.items():
        normalized = drift.max_normalized, drift.mean_normalized
        physical = drift.max_physical, drift.mean_physical
        for i, figures in enumerate(zip(*normalized, *physical, strict=True)):
            table.add_row(name if i == 0 else "", str(i), *(f"{f:.1e}" for f in figures))
    return table
