"""`qvla predict`: an action's milliseconds from a roofline of the target."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import A_BUNDLE, JsonOption, RatesOption
from qvla_export.cli.progress import print_result
from qvla_export.shared.errors import QvlaError


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
    from qvla_export.pipeline.predict import Device, predict_action
    from qvla_export.pipeline.sizing.subject import subject_of_bundle, subject_of_geometry

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
    print_result(report, report.lines(), as_json)
