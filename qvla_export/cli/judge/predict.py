"""`qvla predict`: an action's milliseconds from a roofline of the target."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from qvla_export.cli.options import A_BUNDLE, JsonOption, RatesOption
from qvla_export.cli.progress import print_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.pipeline.predict import PredictedAction


def predict(
    bundle: Annotated[
        Path | None,
        typer.Argument(
            help="Quantized bundle; its plan and inputs are used.", callback=A_BUNDLE.require
        ),
    ] = None,
    geometry: Annotated[
        str | None,
        typer.Option(help="Published sizes instead of a bundle: openvla-7b, pi0-base and others."),
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
        Path | None, typer.Option("--output", help="Write the predictions to this JSON file.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Predict an action's milliseconds from a roofline of the target; nothing is measured."""
    from engines.targets import find_target
    from qvla_export.pipeline.predict import (
        Device,
        predict_action,
        subject_of_bundle,
        subject_of_geometry,
    )

    if geometry is not None and bundle is None:
        subject = subject_of_geometry(geometry, bits, activations)
    elif bundle is not None and geometry is None:
        subject = subject_of_bundle(bundle)
    else:
        raise QvlaError("predict a bundle or a --geometry, one of the two")
    device = Device(find_target(target or subject.target or "orin-jp7"), power_mode, rates)
    report = predict_action(subject, device)
    if output is not None:
        report.save(output)
    if as_json:
        print_json(report.to_json())
        return
    typer.echo(f"predicted, not measured: {report.subject}")
    for row in report.rows:
        typer.echo(_line(row))
    typer.echo(f"rates: {report.rates}")


def _line(row: "PredictedAction") -> str:
    parts = ", ".join(f"{name} {_digits(ms)}" for name, ms in row.parts_ms.items())
    return (
        f"{row.power_mode:>6} {row.weights:>5}: predicted {_digits(row.ms)} ms "
        f"[{_digits(row.low_ms)}, {_digits(row.high_ms)}] = {parts}"
    )


def _digits(ms: float) -> str:
    """Return three digits of small numbers: a small policy takes less than a millisecond."""
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
