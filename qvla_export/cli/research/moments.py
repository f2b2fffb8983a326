"""`qvla moments`: what layers are fed and what their outputs are worth."""

from typing import Annotated

import typer

from qvla_export.cli.options import (
    BatchSizeOption,
    DeviceOption,
    ForceOption,
    MaxMemoryOption,
    PolicyOption,
    PresetOption,
    RunOption,
    UnnormKeyOption,
    WaitOption,
)
from qvla_export.cli.progress import progress_shown


def moments(
    run: RunOption,
    policy: PolicyOption,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    largest_block: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Inputs, or channels, whose moments are kept together; of more, blocks along the "
            "diagonal. Default: 4096, or the largest half of it again that fits the bound.",
        ),
    ] = None,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 8,
    max_memory_gb: MaxMemoryOption = None,
    wait_minutes: WaitOption = 60.0,
    force: ForceOption = False,
) -> None:
    """Measure what layers are fed and what their outputs are worth to the action."""
    from qvla_export.pipeline.moments import moment_demand
    from qvla_export.pipeline.moments import moments as measure_moments
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.resources import joined_resources, open_within
    from qvla_export.pipeline.run_folder import RunFolder

    folder, source = RunFolder(run, force), PolicySource(str(policy), unnorm_key, preset)
    with (
        joined_resources(device, wait_minutes, batch_size, max_memory_gb) as resources,
        progress_shown(silent=resources.world.rank > 0) as on_progress,
    ):
        opened = open_within(resources, source, moment_demand(largest_block))
        fed = measure_moments(folder, opened.policy, resources, largest_block, on_progress)
    if resources.world.rank:
        return  # process 0 speaks for all
    typer.echo(
        f"moments: {len(fed.layers)} layers on {fed.samples} observations -> {folder.moments}"
    )
