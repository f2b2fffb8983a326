"""`qvla verify`: an engine against torch or any other engine."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

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
from qvla_export.cli.progress import print_result, progress_shown
from qvla_export.shared.artifacts import write_json

_GOLDEN = "golden"
RuntimeName = Literal["auto", "ort", "torch"]


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
        RuntimeName, typer.Option(help="auto: the target's; ort: ONNX Runtime, CPU; torch: torch.")
    ] = "auto",
    against_runtime: Annotated[
        RuntimeName, typer.Option(help="Runtime of the bundle of --against: ort, auto or torch.")
    ] = "ort",
    latency: Annotated[bool, typer.Option("--latency", help="Also profile a good engine.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Actions of the latency profile.")] = 200,
    output: Annotated[
        Path | None, typer.Option("--output", help="Report JSON, also of a refused engine.")
    ] = None,
    preset: PresetOption = None,
    threads: ThreadsOption = None,
    weights: WeightsOption = "tuned",
    as_json: JsonOption = False,
) -> None:
    """Compare an engine's actions with torch's or another engine's; exit 2 if they differ."""
    from qvla_export.pipeline.texts.verification_texts import verification_texts
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
    print_result(report, verification_texts(report), as_json)
    report.verdict.require_passed()
