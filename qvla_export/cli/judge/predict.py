"""`qvla predict`: an action's milliseconds from a roofline of the target."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from qvla_export.cli.options import A_BUNDLE, RatesOption
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.latency_model.roofline import LatencyModel, LatencyPrediction


def predict(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="Quantized bundle; its plan and inputs are used.", callback=A_BUNDLE.require
        ),
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option(help="Published sizes instead of a bundle: openvla-7b, openvla-oft-7b."),
    ] = None,
    bits: Annotated[
        str,
        typer.Option(help="Widths of a geometry: 4, or shares of the channels, 8:0.3,4:0.6,0:0.1."),
    ] = "4",
    activations: Annotated[
        Literal["none", "int8"], typer.Option(help="Activations of a geometry's products.")
    ] = "none",
    target: Annotated[
        str | None, typer.Option("--target", help="Target; of a bundle, the one it is for.")
    ] = None,
    power_mode: Annotated[
        str | None, typer.Option("--power-mode", help="One power mode; without it, all of them.")
    ] = None,
    rates: RatesOption = None,
    output: Annotated[
        Path | None, typer.Option("--json", help="Write the predictions to this JSON file.")
    ] = None,
) -> None:
    """Predict an action's milliseconds from a roofline of the target; nothing is measured."""
    from engines.targets import find_target
    from qvla_export.pipeline.predict import Device, subject_of_bundle, subject_of_geometry

    if geometry is not None and bundle is None:
        subject = subject_of_geometry(geometry, bits, activations)
    elif bundle is not None and geometry is None:
        subject = subject_of_bundle(bundle)
    else:
        raise QvlaError("predict a bundle or a --geometry, one of the two")
    device = Device(find_target(target or subject.target or "orin-jp7"), power_mode, rates)
    models = device.models(subject.network)
    found = []
    for model in models:
        found.append(_row(model, "float", model.predict()))
        found.append(_row(model, "plan", model.predict(subject.widths, subject.activations)))
    where = f"{subject.name} on {device.target.name}, activations {subject.activations}"
    typer.echo(f"predicted, not measured: {where}")
    for row in found:
        typer.echo(_line(row))
    typer.echo(f"rates: {models[0].rates.source}")
    if output is not None:
        write_json(output, {"predicted": where, "rows": found})


def _row(model: "LatencyModel", what: str, predicted: "LatencyPrediction") -> dict[str, Any]:
    return {
        "power_mode": model.mode.name,
        "weights": what,
        "predicted_ms": predicted.total_ms,
        "low_ms": predicted.total_ms / predicted.uncertainty,
        "high_ms": predicted.total_ms * predicted.uncertainty,
        "stages_ms": {stage.name: stage.total_ms for stage in predicted.parts},
    }


def _line(row: dict[str, Any]) -> str:
    stages = ", ".join(f"{name} {_digits(ms)}" for name, ms in row["stages_ms"].items())
    return (
        f"{row['power_mode']:>6} {row['weights']:>5}: predicted {_digits(row['predicted_ms'])} ms "
        f"[{_digits(row['low_ms'])}, {_digits(row['high_ms'])}] = {stages}"
    )


def _digits(ms: float) -> str:
    """Three digits of small numbers: a small policy takes less than a millisecond."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
