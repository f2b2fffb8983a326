"""`qvla sensitivities`: what quantizing a channel does to the action."""

from typing import TYPE_CHECKING, Annotated

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
    SeedOption,
    ShareOption,
    TargetOption,
    UnnormKeyOption,
    WaitOption,
    ZeroPointsOption,
)
from qvla_export.cli.progress import progress_shown

if TYPE_CHECKING:
    from qvla_export.sensitivity.sensitivities import Sensitivities

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
    probes: ProbesOption = 4,
    exact_share: ShareOption = 0.02,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    check_pairs: Annotated[
        int, typer.Option(help="(channel, width) pairs to compare with exact measurement.")
    ] = 0,
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

    folder, device_target = RunFolder(run, force), find_target(target, zero_points)
    source = PolicySource(str(policy), unnorm_key, preset)
    request = SensitivityRequest(method, quantizer, probes or None, exact_share, seed)
    with (
        joined_resources(device, wait_minutes, batch_size, max_memory_gb) as resources,
        progress_shown(silent=resources.world.rank > 0) as on_progress,
    ):
        measured, compared = open_and_measure(
            folder, source, device_target, request, resources, check_pairs, on_progress
        )
    if resources.world.rank:
        return  # process 0 speaks for all
    typer.echo(f"sensitivities: {_described(measured)} -> {folder.sensitivities}")
    if measured.standard_error is not None:
        typer.echo(_standard_error(measured))
    if compared is not None:
        typer.echo(
            f"agreement with exact: Spearman {compared.spearman:.4f} on {len(compared.pairs)} "
            f"pairs, time ratio {compared.time_ratio:.5f} -> {folder.agreement}"
        )


def _described(measured: "Sensitivities") -> str:
    channels = sum(v.shape[1] for v in measured.values.values())
    codes = "compensated" if measured.quantizer.needs_moments else "nearest"
    return f"{channels} channels, {measured.method}, {codes} codes, {measured.samples} observations"


def _standard_error(measured: "Sensitivities") -> str:
    """Lines for a terminal; the report has a table."""
    error = measured.standard_error
    if error is None or error.median is None or error.median_by_probes is None:
        return "standard error: unknown"
    by_probes = (error.median_by_probes / error.median) ** 2 if error.median else 0.0
    whole = zip(measured.widths, error.by_width["all layers"].error, strict=True)
    by_width = ", ".join(f"{share:.0%} at {bits} bits" for bits, share in whole)
    return (
        f"standard error: {error.median:.1%} of the median layer and width, probes make "
        f"{by_probes:.0%} of its square; {error.layers:.0%} of the worst, {error.channels:.0%} of "
        f"the median channel; of all layers together {by_width}"
    )
