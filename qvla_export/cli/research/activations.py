"""`qvla activations`: what the layers are fed."""

import typer

from qvla_export.cli.options import (
    DeviceOption,
    PolicyOption,
    PresetOption,
    RunOption,
    UnnormKeyOption,
    WaitOption,
)


def activations(
    run: RunOption,
    policy: PolicyOption,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    device: DeviceOption = "auto",
    wait_minutes: WaitOption = 60.0,
) -> None:
    """Record what the layers are fed; settings such as w8a8 take their ranges from it.

    Under torchrun, processes share the observations.
    """
    from qvla_export.pipeline import plan as stages
    from qvla_export.pipeline.policy_source import open_checkpoint
    from qvla_export.pipeline.resources import joined_resources
    from qvla_export.pipeline.run_folder import RunFolder

    folder = RunFolder(run)
    with joined_resources(device, wait_minutes) as resources:
        loaded = open_checkpoint(policy, unnorm_key, preset)
        loaded.module.to(resources.world.device)
        fed = stages.activations(folder, loaded, resources.world)
    if resources.world.rank:
        return  # process 0 speaks for all
    layers = sum(len(names) for names in fed.histograms)
    typer.echo(
        f"activations: {len(fed.histograms)} inputs of {layers} layers on {fed.samples} "
        f"observations -> {folder.activations}"
    )
