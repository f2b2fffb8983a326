"""`qvla smooth`: an equal checkpoint whose layers are fed no outliers."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from qvla_export.cli.options import (
    PolicyOption,
    PresetOption,
    RunOption,
    TargetOption,
    UnnormKeyOption,
    open_checkpoint,
)
from qvla_export.pipeline.run_folder import RunFolder, made

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.policies.base import Policy
    from qvla_export.policies.smoothing import Migration
    from qvla_export.shared.target import Target

# 0 would move everything to the inputs, 1 to the weights.
_STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(smooth)


def smooth(
    output: Annotated[Path, typer.Argument(help="Checkpoint folder to write.")],
    run: RunOption,
    policy: PolicyOption,
    strength: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="Share of outliers moved into the weights; default: of 0.4 to 0.8 the one with "
            "the least action error at uniform 8-bit weights and activations.",
        ),
    ] = None,
    powers_of_two: Annotated[
        bool,
        typer.Option(
            help="Scale by powers of two: the checkpoint keeps its types and size and acts bit for "
            "bit as before. Without it scaled weights are stored in float32."
        ),
    ] = False,
    target: TargetOption = "cpu",
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Move outliers of the layers' inputs into norms and weights before them (SmoothQuant).

    The result is a checkpoint that acts as before, in float, and loses less where inputs are
    rounded (a8): take it through `qvla deploy` instead of the other.
    """
    from engines.targets import find_target
    from qvla_export.policies.families import recognize
    from qvla_export.policies.smoothing import smoothed_tensors

    opened = open_checkpoint(policy, unnorm_key, preset)
    strengths = _STRENGTHS if strength is None else (strength,)
    tried = _tried(RunFolder(run), opened, find_target(target), strengths, powers_of_two)
    say = Console(soft_wrap=True).print
    for name, (_, error) in tried.items():
        what = "not smoothed" if name is None else f"strength {name}"
        say(f"{what}: action error {error:.5f} RMS at 8-bit weights and inputs")
    best = min(strengths, key=lambda value: tried[value][1])
    tensors = smoothed_tensors(opened.module, tried[best][0])
    recognize(policy).write_smoothed(policy, output, tensors, keep_types=powers_of_two)
    say(f"{output}: smoothed by {best}; next: qvla deploy --policy {output}")


def _tried(
    run: RunFolder,
    policy: "Policy",
    target: "Target",
    strengths: Sequence[float],
    powers_of_two: bool,
) -> "dict[float | None, tuple[dict[Migration, Tensor], float]]":
    """Factors and action error of every strength; None is the policy as it was."""
    from calibration.calibration_set import CalibrationSet
    from qvla_export.measurement.smoothing import input_maxima, smoothing_error
    from qvla_export.policies.smoothing import smoothing_factors

    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    observations, migrations = calibration.observations, policy.migrations()
    tried: dict[float | None, tuple[dict[Migration, Tensor], float]] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("smoothing", total=len(strengths) + 2)
        maxima = input_maxima(policy, observations)
        progress.advance(task)
        for value in (None, *strengths):
            factors: dict[Migration, Tensor] = {}
            if value is not None:
                factors = smoothing_factors(policy.module, migrations, maxima, value, powers_of_two)
            error = smoothing_error(policy, factors, observations, calibration.digest, target)
            tried[value] = factors, error
            progress.advance(task)
    return tried
