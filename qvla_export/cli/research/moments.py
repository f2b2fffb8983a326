"""`qvla moments`: what layers are fed and what their outputs are worth."""

from typing import Annotated

import typer

from qvla_export.cli.options import (
    BatchSizeOption,
    DeviceOption,
    MaxMemoryOption,
    PolicyOption,
    PresetOption,
    RunOption,
    UnnormKeyOption,
    WaitOption,
)


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
) -> None:
    """Measure what layers are fed and what their outputs are worth to the action."""
    from qvla_export.pipeline import moments as compensating
    from qvla_export.pipeline.resources import joined_resources, open_within
    from qvla_export.pipeline.run_folder import RunFolder

    folder = RunFolder(run)
    with joined_resources(device, wait_minutes, batch_size, max_memory_gb) as resources:
        demand = compensating.moment_demand(largest_block)
        opened = open_within(resources, policy, unnorm_key, preset, demand)
        found = compensating.moments(folder, opened.policy, resources, largest_block)
    if resources.world.rank:
        return  # process 0 speaks for all
    typer.echo(
        f"moments: {len(found.layers)} layers on {found.samples} observations -> {folder.moments}"
    )
