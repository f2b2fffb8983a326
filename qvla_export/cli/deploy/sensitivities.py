"""`qvla sensitivities`: what quantizing a channel does to the action."""

from typing import Annotated

import typer

from qvla_export.cli.options import (
    BatchSizeOption,
    DeviceOption,
    ForceOption,
    MaxMemoryOption,
    PolicyOption,
    PresetOption,
    ProbesOption,
    QuantizerOption,
    RunOption,
    ScalesOption,
    SeedOption,
    ShareOption,
    TargetOption,
    UnnormKeyOption,
    WaitOption,
    ZeroPointsOption,
)
from qvla_export.cli.progress import print_texts, progress_shown

MethodOption = Annotated[
    str,
    typer.Option(
        "--method",
        help="first-order, norm-product (eq. 6), isotropic-noise (appendix G), hessian (the "
        "official code's proxy), two-stage, exact (eq. 4), cumulative (eq. 5, exact steps) or "
        "cumulative-first-order.",
    ),
]


def sensitivities(
    run: RunOption,
    policy: PolicyOption,
    target: TargetOption = "cpu",
    method: MethodOption = "first-order",
    quantizer: QuantizerOption = None,
    zero_points: ZeroPointsOption = False,
    scales: ScalesOption = "group",
    probes: ProbesOption = 4,
    exact_share: ShareOption = 0.02,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    check_pairs: Annotated[
        int, typer.Option(help="(channel, width) pairs to compare with exact measurement.")
    ] = 0,
    per_step: Annotated[
        bool, typer.Option(help="Of a flow: what each step does, not the action that they make.")
    ] = False,
    kept_layers: Annotated[
        bool, typer.Option(help="Of layers that stay in 16 bits too: the report says what for.")
    ] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    batch_size: BatchSizeOption = 8,
    max_memory_gb: MaxMemoryOption = None,
    wait_minutes: WaitOption = 60.0,
    force: ForceOption = False,
) -> None:
    """Measure what quantizing each channel to each width does to the action.

    Under torchrun, processes share the observations:
    torchrun --nproc-per-node 2 -m qvla_export sensitivities ...
    """
    from engines.targets import find_target
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.resources import joined_resources
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.pipeline.sensitivities import SensitivityRequest, open_and_measure
    from qvla_export.pipeline.texts.stage_texts import sensitivity_lines

    folder, device_target = RunFolder(run, force), find_target(target, zero_points, scales)
    source = PolicySource(str(policy), unnorm_key, preset)
    how = (method, quantizer, probes or None, exact_share, seed, per_step, kept_layers)
    request = SensitivityRequest(*how)
    with (
        joined_resources(device, wait_minutes, batch_size, max_memory_gb) as resources,
        progress_shown(silent=resources.world.rank > 0) as on_progress,
    ):
        measured, compared = open_and_measure(
            folder, source, device_target, request, resources, check_pairs, on_progress
        )
    if resources.world.rank:
        return  # process 0 speaks for all
    print_texts(sensitivity_lines(measured, folder.sensitivities, compared, folder.agreement))
