"""`qvla smooth`: an equal checkpoint whose layers are fed no outliers."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qvla_export.cli.options import (
    PolicyOption,
    PresetOption,
    RunOption,
    TargetOption,
    UnnormKeyOption,
)

# 0 would move everything to the inputs, 1 to the weights.
_STRENGTHS = (0.4, 0.5, 0.6, 0.7, 0.8)


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
    from qvla_export.pipeline.policy_source import open_checkpoint
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.pipeline.smooth import smoothing_trials
    from qvla_export.policies.families import recognize
    from qvla_export.policies.smoothing import smoothed_tensors

    opened = open_checkpoint(policy, unnorm_key, preset)
    strengths = _STRENGTHS if strength is None else (strength,)
    tried = smoothing_trials(RunFolder(run), opened, find_target(target), strengths, powers_of_two)
    say = Console(soft_wrap=True).print
    for name, (_, error) in tried.items():
        what = "not smoothed" if name is None else f"strength {name}"
        say(f"{what}: action error {error:.5f} RMS at 8-bit weights and inputs")
    best = min(strengths, key=lambda value: tried[value][1])
    tensors = smoothed_tensors(opened.module, tried[best][0])
    recognize(policy).write_smoothed(policy, output, tensors, keep_types=powers_of_two)
    say(f"{output}: smoothed by {best}; next: qvla deploy --policy {output}")
