"""`qvla activations`: what the layers are fed."""

import typer

from qvla_export.cli.options import (
    DeviceOption,
    ForceOption,
    PolicyOption,
    PresetOption,
    RunOption,
    UnnormKeyOption,
    WaitOption,
)
from qvla_export.cli.progress import progress_shown


def activations(
    run: RunOption,
    policy: PolicyOption,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    device: DeviceOption = "auto",
    wait_minutes: WaitOption = 60.0,
    force: ForceOption = False,
) -> None:
    """Record what the layers are fed; settings such as w8a8 take their ranges from it.

    Under torchrun, processes share the observations.
    """
    from qvla_export.pipeline.activations import activations as record_activations
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.resources import joined_resources, open_within
    from qvla_export.pipeline.run_folder import RunFolder

    folder, source = RunFolder(run, force), PolicySource(str(policy), unnorm_key, preset)
    with (
        joined_resources(device, wait_minutes) as resources,
        progress_shown(silent=resources.world.rank > 0) as on_progress,
    ):
        opened = open_within(resources, source, None)
        fed = record_activations(folder, opened.policy, resources.world, on_progress)
    if resources.world.rank:
        return  # process 0 speaks for all
    layers = sum(len(names) for names in fed.histograms)
    typer.echo(
        f"activations: {len(fed.histograms)} inputs of {layers} layers on {fed.samples} "
        f"observations -> {folder.activations}"
    )
