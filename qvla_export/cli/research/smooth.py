"""`qvla smooth`: an equal checkpoint whose layers are fed no outliers."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    JsonOption,
    PolicyOption,
    PresetOption,
    RunOption,
    TargetOption,
    UnnormKeyOption,
)
from qvla_export.cli.progress import print_json, progress_shown


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
    as_json: JsonOption = False,
) -> None:
    """Move outliers of the layers' inputs into norms and weights before them (SmoothQuant).

    The result is a checkpoint that acts as before, in float, and loses less where inputs are
    rounded (a8): take it through `qvla deploy` instead of the other.
    """
    from engines.targets import find_target
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.pipeline.smooth import STRENGTHS, smooth_checkpoint

    source = PolicySource(str(policy), unnorm_key, preset)
    strengths = STRENGTHS if strength is None else (strength,)
    with progress_shown() as on_progress:
        checkpoint = smooth_checkpoint(
            RunFolder(run),
            source,
            output,
            find_target(target),
            strengths,
            powers_of_two,
            on_progress,
        )
    if as_json:
        print_json(checkpoint.to_json())
        return
    for trial in checkpoint.trials:
        what = "not smoothed" if trial.strength is None else f"strength {trial.strength}"
        typer.echo(f"{what}: action error {trial.action_error:.5f} RMS at 8-bit weights and inputs")
    typer.echo(f"{output}: smoothed by {checkpoint.strength}; next: qvla deploy --policy {output}")
