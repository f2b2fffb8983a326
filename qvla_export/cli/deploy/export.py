"""`qvla export`: the bundle a robot receives."""

from typing import Annotated

import typer

from qvla_export.cli.options import (
    ForceOption,
    LayersPerPartOption,
    PolicyOption,
    PresetOption,
    RunOption,
    SettingOption,
    TargetOption,
    UnnormKeyOption,
)
from qvla_export.cli.progress import progress_shown

AccuracyOption = Annotated[
    int,
    typer.Option(
        min=0,
        max=4,
        help="Of the cpu target's packed products: 0 keeps float activations; 4 rounds them "
        "to 8 bits a block, much faster where a layer sees few rows.",
    ),
]


def export(
    run: RunOption,
    policy: PolicyOption,
    setting: SettingOption,
    target: TargetOption = "cpu",
    layers_per_part: LayersPerPartOption = None,
    accuracy_level: AccuracyOption = 0,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    force: ForceOption = False,
) -> None:
    """Write the bundle a robot receives: bucketed ONNX, packed weights, golden observations."""
    from engines.targets import find_target
    from qvla_export.allocation.setting import parse_setting
    from qvla_export.pipeline.export import export as export_setting
    from qvla_export.pipeline.export import graph_figures
    from qvla_export.pipeline.policy_source import open_checkpoint
    from qvla_export.pipeline.run_folder import RunFolder

    device = find_target(target)
    folder, parsed = RunFolder(run, force), parse_setting(setting, device)
    opened = open_checkpoint(policy, unnorm_key, preset, resident=layers_per_part is None)
    with progress_shown() as on_progress:
        bundle = export_setting(
            folder, parsed, opened, device, layers_per_part, accuracy_level, on_progress
        )
    typer.echo(f"bundle: {bundle.nbytes / 1e6:.2f} MB -> {bundle.path}")
    typer.echo(graph_figures(bundle))
