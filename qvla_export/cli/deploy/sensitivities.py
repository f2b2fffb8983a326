"""`qvla sensitivities`: what quantizing a channel does to the action."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from qvla_export.cli.options import (
    BatchSizeOption,
    DeviceOption,
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
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.pipeline.resources import Demand
    from qvla_export.policies.layers import Layers
    from qvla_export.sensitivity.sensitivities import Sensitivities
    from qvla_export.shared.target import Target

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
    quantizer: QuantizerOption = "nearest",
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
) -> None:
    """Measure what quantizing each channel to each width does to the action.

    Under torchrun, processes share the observations:
    torchrun --nproc-per-node 2 -m qvla_export sensitivities ...
    """
    from engines.targets import find_target
    from qvla_export.pipeline import plan as stages
    from qvla_export.pipeline.resources import joined_resources, open_within
    from qvla_export.pipeline.run_folder import RunFolder
    from qvla_export.sensitivity.estimators.registry import STREAMED, Options, find_estimator

    folder, wanted = RunFolder(run), find_target(target, zero_points)
    with joined_resources(device, wait_minutes, batch_size, max_memory_gb) as resources:
        told = Options(probes or None, exact_share, resources.max_bytes)
        find_estimator(method, told)  # says what is wrong before much is read
        if quantizer == "compensated" and method != "first-order":
            raise QvlaError(
                f"sensitivities of compensated codes are of first order, got --method {method}"
            )
        compensated = quantizer == "compensated"
        streams = method in STREAMED and not check_pairs
        demand = _demand(wanted, compensated) if streams else None
        opened = open_within(resources, policy, unnorm_key, preset, demand)
        loaded = opened.policy
        estimator = find_estimator(method, replace(told, max_bytes=opened.max_bytes))
        measured = stages.sensitivities(
            folder, loaded, wanted, estimator, seed, resources, compensated
        )
    if resources.world.rank:
        return  # process 0 speaks for all
    typer.echo(f"sensitivities: {_described(measured)} -> {folder.sensitivities}")
    if measured.standard_error is not None:
        typer.echo(_standard_error(measured))
    if check_pairs:
        compared = stages.agreement(folder, loaded, check_pairs, seed)
        typer.echo(
            f"agreement with exact: Spearman {compared.spearman:.4f} on {len(compared.pairs)} "
            f"pairs, time ratio {compared.time_ratio:.5f} -> {folder.agreement}"
        )


def _demand(target: "Target", compensated: bool) -> "Demand":
    """Return what measuring to first order takes of memory, with the moments that it may need."""
    from qvla_export.measurement.standard_error import empty_sums
    from qvla_export.measurement.weight_errors import error_needs
    from qvla_export.pipeline.moments import moment_demand
    from qvla_export.pipeline.resources import Demand
    from qvla_export.quantizer.quantize import compensated_spec, spec_for
    from qvla_export.sensitivity.estimators.base import Question

    spec = compensated_spec(target) if compensated else spec_for(target)

    def held_of(layers: "Layers") -> int:
        channels = {name: len(layer.weight) for name, layer in layers.items()}
        sums = sum(array.nbytes for array in empty_sums(channels, len(Question.widths)).values())
        return max(sums, moment_demand().held_of(layers)) if compensated else sums

    return Demand(error_needs(spec, Question.widths), held_of)


def _described(measured: "Sensitivities") -> str:
    channels = sum(v.shape[1] for v in measured.values.values())
    return f"{channels} channels, {measured.method}, {measured.samples} observations"


def _standard_error(measured: "Sensitivities") -> str:
    """Lines for a terminal; the report has a table."""
    error = measured.standard_error
    if error is None or error.median is None or error.median_by_probes is None:
        return "standard error: unknown"
    share = (error.median_by_probes / error.median) ** 2 if error.median else 0.0
    whole = zip(measured.widths, error.by_width["all layers"].error, strict=True)
    by_width = ", ".join(f"{found:.0%} at {bits} bits" for bits, found in whole)
    return (
        f"standard error: {error.median:.1%} of the median layer and width, probes make "
        f"{share:.0%} of its square; {error.layers:.0%} of the worst, {error.channels:.0%} of the "
        f"median channel; of all layers together {by_width}"
    )
