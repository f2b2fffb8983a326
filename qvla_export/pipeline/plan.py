"""The step that allocates bits to channels, and what reads its plans."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

from qvla_export.allocation.budget import LatencyLimit
from qvla_export.allocation.plan_request import PlanRequest, shapes_of
from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.progress import OnProgress, Progress, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current, require_artifact
from qvla_export.pipeline.work.log import ArtifactWork, Value, recorded_work, short
from qvla_export.quantizer.activation_statistics import ActivationStatistics
from qvla_export.quantizer.activations import DEFAULT_METHOD, TOKEN_RANGES, RangeMethod
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import QuantizerSpec, spec_for
from qvla_export.quantizer.round_plan import with_rounding
from qvla_export.quantizer.rounding import Rounding
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.artifacts import require_same
from qvla_export.shared.target import Target

_MEASURE = "Measure the sensitivities of this policy: qvla sensitivities."


@dataclass(frozen=True)
class PlanOptions:
    """What a plan obeys beside its setting."""

    # How the ranges of 8-bit activations are chosen.
    ranges: RangeMethod = DEFAULT_METHOD
    # Longest predicted action; None for no limit.
    latency: LatencyLimit | None = None
    # Allocator, budget and widths; None for the setting's own.
    request: PlanRequest | None = None
    # Whether its codes are tuned together, see `QuantizerSpec.tuned_codes`.
    tune_codes: bool = False


def plan(
    run: RunFolder,
    setting: Setting,
    target: Target,
    policy_digest: str,
    options: PlanOptions | None = None,
    on_progress: OnProgress = ignore,
) -> BitPlan | None:
    """Allocate bits for a setting, leaving a file of the same plan alone; None for float.

    Raises:
        QvlaError: sensitivities or activations are missing or of another policy, or no plan keeps
            to the budget.
    """
    options = options or PlanOptions()
    if setting.kind == "float":
        return None
    work = f"plan, {setting.name}"
    on_progress(Progress(work))
    measured = load_sensitivities(run, policy_digest)
    if setting.kind == "uniform":
        planned = uniform_plan(
            shapes_of(measured), int(setting.bits), target, policy_digest, _round_to_nearest(target)
        )
    else:
        _require_groups_of(target, measured)
        request = options.request or PlanRequest.for_setting(setting, measured, target)
        planned = request.allocate(measured, target, options.latency)
        if options.tune_codes:
            planned = replace(planned, quantizer=replace(planned.quantizer, tuned_codes=True))
    if setting.activation_bits is not None:
        if setting.activation_bits == 8 and options.ranges == "token":
            target.require(TOKEN_RANGES)
        planned = _with_activations(run, planned, setting.activation_bits, options.ranges)
    current = _same_plan(run, setting, planned)
    if not current:
        with recorded_work(_work(run, setting, planned, measured, options), on_progress):
            planned.save(run.plan(setting))
    finish(on_progress, work, kept=current)
    return planned


def _same_plan(run: RunFolder, setting: Setting, planned: BitPlan) -> bool:
    """Whether the file says what a plan would say there."""
    earlier = load_if_current(run.plan(setting), BitPlan.load)
    return earlier is not None and earlier.digest == planned.digest


def _work(
    run: RunFolder,
    setting: Setting,
    planned: BitPlan,
    measured: Sensitivities,
    options: PlanOptions,
) -> ArtifactWork:
    words: dict[str, Value] = {
        "plan": short(planned.digest),
        "--target": planned.target,
        "budget": json.dumps(planned.budget),
    }
    sources: list[Path] = []
    if setting.kind != "uniform":
        words["sensitivities"] = short(measured.digest)
        sources.append(run.sensitivities)
    if setting.activation_bits is not None:
        words["--activations-method"] = options.ranges
        sources.append(run.activations)
    return ArtifactWork(run, run.plan(setting), words, tuple(sources))


def load_sensitivities(run: RunFolder, policy_digest: str | None = None) -> Sensitivities:
    """Read a run's sensitivities.

    Raises:
        ArtifactError: they are missing or damaged.
        ArtifactMismatch: they are of another policy than `policy_digest`.
    """
    measured = Sensitivities.load(require_artifact(run.sensitivities, "sensitivities"))
    if policy_digest is not None:
        require_same("policy and sensitivities", measured.policy_digest, policy_digest, _MEASURE)
    return measured


def load_plan(run: RunFolder, setting: Setting, with_rounded_codes: bool = True) -> BitPlan | None:
    """Read a setting's plan, with its codes where it has some of its own; None for float.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    if setting.kind == "float":
        return None
    planned = BitPlan.load(require_artifact(run.plan(setting), f"plan --setting {setting.name}"))
    return with_codes(run, setting, planned) if with_rounded_codes else planned


def digest_of_codes(planned: BitPlan) -> str:
    """Return what tells a plan from others: its codes' digest where it has some of its own."""
    return planned.digest if planned.rounding is None else planned.rounding.digest


def with_codes(run: RunFolder, setting: Setting, planned: BitPlan) -> BitPlan:
    """Return a plan with the codes that were made for it; one of nearest codes as it is.

    Raises:
        ArtifactError: they are missing.
        ArtifactMismatch: they are of another plan.
    """
    if not planned.quantizer.needs_moments:
        return planned
    path = require_artifact(run.rounding(setting), f"round --setting {setting.name}")
    return with_rounding(planned, Rounding.load(path))


def _require_groups_of(target: Target, measured: Sensitivities) -> None:
    """Refuse sensitivities of scales that the target does not store; its graphs would as well."""
    stored = {bits: rule.group_size for bits, rule in spec_for(target).rules.items()}
    groups = {bits: rule.group_size for bits, rule in measured.quantizer.rules.items()}
    again = f"Measure for this target: qvla sensitivities --target {target.name}."
    require_same("scale groups of sensitivities and target", str(groups), str(stored), again)


def _with_activations(run: RunFolder, planned: BitPlan, bits: int, method: RangeMethod) -> BitPlan:
    fed = ActivationStatistics.load(require_artifact(run.activations, "activations"))
    again = "Record this policy's activations: qvla activations."
    require_same("policy and activations", fed.policy_digest, planned.policy_digest, again)
    if planned.calibration_digest is not None:
        digests = (planned.calibration_digest, fed.calibration_digest)
        require_same("sensitivities and activations", *digests, again)
    return replace(
        planned,
        activations=fed.ranges(bits, method),
        calibration_digest=fed.calibration_digest,
    )


def _round_to_nearest(target: Target) -> QuantizerSpec:
    """The target's own containers, scales from the largest weight: the plain baseline."""
    rules = spec_for(target).rules
    return QuantizerSpec({bits: replace(rule, scale="max") for bits, rule in rules.items()})
