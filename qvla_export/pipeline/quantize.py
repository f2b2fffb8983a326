"""A policy and observations -> a bundle and what it does to the actions, in one call."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.allocation.setting import Setting, parse_setting
from qvla_export.pipeline.activations import activations
from qvla_export.pipeline.build import build_bundle
from qvla_export.pipeline.calibrate import put_calibration
from qvla_export.pipeline.evaluate import action_error
from qvla_export.pipeline.export import export
from qvla_export.pipeline.plan import PlanOptions, load_plan, plan
from qvla_export.pipeline.progress import NumberedSteps, OnProgress, ignore
from qvla_export.pipeline.round import round_setting
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.pipeline.sensitivities import SensitivityRequest, sensitivities
from qvla_export.pipeline.sizing.holding import IN_MEMORY, Holding

if TYPE_CHECKING:
    from calibration.calibration_set import CalibrationSet
    from qvla_export.pipeline.action_error import HeldOutError
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.sensitivity.sensitivities import Sensitivities
    from qvla_export.shared.bundle import Bundle
    from qvla_export.shared.target import Target


@dataclass(frozen=True)
class QuantizationResult:
    """What quantizing a policy made, all of it in one run folder."""

    run: RunFolder
    setting: Setting
    sensitivities: "Sensitivities"
    # Widths of every channel, with their codes.
    plan: "BitPlan"
    bundle: "Bundle"
    # On the held-out observations, by the bundle's own engine.
    action_error: "HeldOutError"

    def __repr__(self) -> str:
        return (
            f"<QuantizationResult {self.setting.name}: action error {self.action_error.rms:.2g} "
            f"(RMS, normalized), {self.bundle.nbytes / 1e6:.2f} MB -> {self.bundle.path}>"
        )


def quantize(
    policy: "Policy",
    observations: "CalibrationSet",
    run: Path | str,
    bits: float = 4,
    target: str = "cpu",
    activation_bits: int | None = None,
    on_progress: OnProgress = ignore,
) -> QuantizationResult:
    """Quantize a policy to so many mean bits per channel, and measure what that does to actions.

    A second call with the same run folder repeats only what is not up to date, and an interrupted
    one goes on.

    Args:
        policy: what `load_policy` returned.
        observations: to measure on, and held-out ones to judge by.
        run: folder of what is made.
        bits: mean bits per channel, at no more bytes than the uniform width.
        target: device and runtime: "cpu", "cuda", "rtx4070", "orin-jp7" or "orin-jp6".
        activation_bits: 8 rounds the inputs of the layers as well; None leaves them in float.
        on_progress: hears of every step.

    Raises:
        QvlaError: policy, observations, run folder and target do not fit together, or the bundle's
            engine does not do what torch does with the same weights.
    """
    from engines.targets import find_target

    device, folder = find_target(target), RunFolder(Path(run))
    rounded = "" if activation_bits is None else f"a{activation_bits}"
    setting = parse_setting(f"w{bits:g}{rounded}", device)
    policy.processor.feeds(observations.held_out[0])  # refused here rather than after the long work
    steps = NumberedSteps(on_progress, 3 if activation_bits is None else 4)
    with steps.next("calibration") as hear:
        put_calibration(folder, observations, hear)
    with steps.next("sensitivities of every channel and width") as hear:
        request = SensitivityRequest(quantizer="compensated")
        measured = sensitivities(folder, policy, device, request, on_progress=hear)
    if activation_bits is not None:
        with steps.next("activations of every layer") as hear:
            activations(folder, policy, on_progress=hear)
    with steps.next(f"{setting.name}: plan, bundle, engine, action error") as hear:
        bundle, error = quantize_setting(folder, setting, policy, device, on_progress=hear)
    planned = load_plan(folder, setting)
    assert planned is not None  # only the float setting has none
    return QuantizationResult(folder, setting, measured, planned, bundle, error)


def quantize_setting(
    run: RunFolder,
    setting: Setting,
    policy: "Policy",
    target: "Target",
    holding: Holding = IN_MEMORY,
    options: PlanOptions | None = None,
    on_progress: OnProgress = ignore,
) -> "tuple[Bundle, HeldOutError]":
    """Make one setting's plan, codes, bundle and engine, and measure its held-out action error.

    The policy is held as `holding` says: one that is read part by part gives a bundle in parts.

    Raises:
        QvlaError: see the steps; the bundle breaks a rule of its target, or its engine drifts.
    """
    from engines.check.bundle import check_bundle
    from engines.check.finding import require_no_errors
    from engines.load import runtime_here

    plan(run, setting, target, policy.digest, options)
    round_setting(run, setting, policy, holding.resources(), on_progress)
    parts = holding.layers_per_part
    bundle = export(run, setting, policy, target, parts, on_progress=on_progress)
    require_no_errors(check_bundle(bundle, target))
    native = runtime_here(target) == target.runtime
    if target.runtime == "tensorrt_rtx" or (native and target.runtime == "tensorrt"):
        build_bundle(bundle, on_progress=on_progress)
    return bundle, action_error(run, setting, policy, on_progress)
