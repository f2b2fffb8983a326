"""`qvla moments`, `qvla round` and `qvla quantizers`: codes made from what the layers are fed."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from qvla_export.allocation.setting import parse_setting
from qvla_export.cli.options import (
    BatchSizeOption,
    DeviceOption,
    MaxMemoryOption,
    PolicyOption,
    PresetOption,
    RunOption,
    SettingOption,
    TargetOption,
    UnnormKeyOption,
    WaitOption,
    open_checkpoint,
)
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.quantizer.quantize import QuantizerSpec, compensated_spec, spec_for
from qvla_export.shared.artifacts import versions, write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.allocation.plan_request import PlanRequest
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.moments import Moments
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.sensitivity.sensitivities import Sensitivities
    from qvla_export.shared.observation import Observation
    from qvla_export.shared.target import Target


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(moments)
    app.command(name="round")(round_setting)
    app.command()(quantizers)


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


def round_setting(
    run: RunOption,
    policy: PolicyOption,
    setting: SettingOption,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Make the codes of a plan whose quantizer compensates errors; qvla export packs them."""
    from qvla_export.pipeline import moments as compensating

    folder, wanted = RunFolder(run), parse_setting(setting)
    loaded = open_checkpoint(policy, unnorm_key, preset, resident=False)
    planned = compensating.rounded(folder, wanted, loaded)
    if planned is None or planned.rounding is None:
        raise QvlaError(
            f"the plan of {setting} takes the nearest codes, nothing is to be made; for others: "
            "qvla sensitivities --quantizer compensated, then qvla plan"
        )
    typer.echo(f"rounding: {len(planned.rounding.layers)} layers -> {folder.rounding(wanted)}")


def quantizers(
    run: RunOption,
    policy: PolicyOption,
    target: TargetOption = "cpu",
    bits: Annotated[str, typer.Option(help="Mean bits of the plans, comma-separated.")] = (
        "4,3,2.5,2"
    ),
    output: Annotated[Path, typer.Option(help="JSON file.")] = Path("quantizers.json"),
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Compare what each part of the quantizer does to held-out actions.

    Plans are those of the sensitivities; with zero points they are made anew for the same bytes.
    """
    from calibration.calibration_set import CalibrationSet
    from engines.targets import find_target
    from qvla_export.allocation.plan_request import PlanRequest
    from qvla_export.pipeline import moments as compensating
    from qvla_export.sensitivity.sensitivities import Sensitivities

    folder, device = RunFolder(run), find_target(target)
    loaded = open_checkpoint(policy, unnorm_key, preset)
    measured = Sensitivities.load(folder.sensitivities)
    found = compensating.moments(folder, loaded)
    held_out = CalibrationSet.load(folder.calibration).held_out
    rows: list[dict[str, Any]] = []
    for text in bits.split(","):
        request = PlanRequest.for_setting(parse_setting(f"w{text}", device), measured, device)
        plans = _equal_plans(request, measured, device)
        for row in _compared(loaded, plans, found, held_out):
            rows.append({"mean_bits": text, **row})
            typer.echo(
                f"w{text} {row['share_of_float16']:.4f}  {row['quantizer']:<40} "
                f"{row['rms']:.5f}  {row['seconds']:.1f} s"
            )
    about = {"sensitivities_digest": measured.digest, "moments_digest": found.digest}
    write_json(output, {**about, "versions": versions(), "rows": rows})


def variants(target: "Target") -> dict[str, QuantizerSpec]:
    """Return quantizers that differ in one part, and the whole."""
    nearest, whole = spec_for(target), compensated_spec(target)
    inputs = replace(nearest, weighted_scales=True, compensation="inputs")
    pointed = {}
    if "zero points" not in target.refusals:
        stored = target.with_zero_points()
        pointed = {
            "nearest, zero points": spec_for(stored),
            "inputs and channels, bias, zero points": compensated_spec(stored),
        }
    return {
        "nearest": nearest,
        "bias correction": replace(nearest, bias_correction=True),
        "weighted scales": replace(nearest, weighted_scales=True),
        "inputs": inputs,
        "inputs, bias": replace(inputs, bias_correction=True),
        "inputs and channels": replace(whole, bias_correction=False),
        "inputs and channels, bias": whole,
        **pointed,
    }


def _equal_plans(
    request: "PlanRequest", measured: "Sensitivities", target: "Target"
) -> "dict[str, BitPlan]":
    """Return a plan for each quantizer, none of more bytes than that of the first."""
    plans: dict[str, BitPlan] = {}
    for name, spec in variants(target).items():
        plans[name] = request.allocate(replace(measured, quantizer=spec), target, None)
        if len(plans) == 1:
            capped = replace(request.budget, max_stored_ratio=plans[name].ratio)
            request = replace(request, budget=capped)
    return plans


def _compared(
    policy: "Policy",
    plans: "Mapping[str, BitPlan]",
    found: "Moments",
    observations: "tuple[Observation, ...]",
) -> Iterator[dict[str, Any]]:
    """Yield what each quantizer does to the actions: RMS, normalized, and the time it takes."""
    from qvla_export.policies.layers import fake_quantized
    from qvla_export.quantizer.round_plan import round_plan

    exact = _actions(policy, observations)
    for name, plan in plans.items():
        started = time.perf_counter()
        tried = round_plan(policy, plan, found) if plan.quantizer.needs_moments else plan
        seconds = time.perf_counter() - started
        with fake_quantized(policy, tried):
            moved = _actions(policy, observations) - exact
        rms = float(np.sqrt(np.square(moved).mean()))
        share = plan.ratio
        yield {"quantizer": name, "share_of_float16": share, "rms": rms, "seconds": seconds}


def _actions(policy: "Policy", observations: "tuple[Observation, ...]") -> NDArray[np.float32]:
    size = 16
    chunks = [observations[i : i + size] for i in range(0, len(observations), size)]
    return np.concatenate([policy.greedy_actions(policy.batch(c)).numpy() for c in chunks])
