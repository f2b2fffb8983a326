"""The stages of a run: each reads one artifact and writes one, and keeps what is up to date."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from qvla_export.allocation.budget import LatencyLimit
from qvla_export.allocation.plan_request import PlanRequest, shapes_of
from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.reuse import bar as bar
from qvla_export.pipeline.reuse import kept_artifact as kept_artifact
from qvla_export.pipeline.run_folder import RunFolder, made
from qvla_export.quantizer.activation_statistics import ActivationStatistics
from qvla_export.quantizer.activations import DEFAULT_METHOD, RangeMethod
from qvla_export.quantizer.plan import BitPlan, uniform_plan
from qvla_export.quantizer.quantize import QuantizerSpec, spec_for
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.artifacts import require_same
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from calibration.calibration_set import CalibrationSet
    from calibration.sources.lerobot import LeRobotDataset
    from qvla_export.measurement.distributed import World
    from qvla_export.pipeline.resources import Resources
    from qvla_export.policies.base import Policy
    from qvla_export.sensitivity.agreement import Agreement
    from qvla_export.sensitivity.estimators.base import Estimator, Question

_MEASURE_AGAIN = "Measure and plan again on this set: qvla sensitivities, qvla plan."
_MEASURE = "Measure the sensitivities of this policy: qvla sensitivities."


def calibrate(
    run: RunFolder,
    dataset: "LeRobotDataset | None",
    tasks: Sequence[str],
    count: int,
    held_out: int,
    seed: int,
    frames_per_episode: int | None = None,
) -> "CalibrationSet":
    """Draw the calibration set of a data set or the simulator, or keep that of the same source."""
    from calibration.calibration_set import (
        FRAMES_PER_EPISODE,
        CalibrationSet,
        sample_dataset,
        sample_simulator,
    )

    wanted: dict[str, Any] = {"count": count, "held_out": held_out, "seed": seed}
    wanted |= {"simulator": list(tasks)} if dataset is None else dataset.identity()
    frames = frames_per_episode or FRAMES_PER_EPISODE
    if frames != FRAMES_PER_EPISODE:
        wanted["frames_per_episode"] = frames
    kept = kept_artifact(run.calibration, CalibrationSet.load)
    if kept is not None and dict(kept.source) == wanted:
        return kept
    if dataset is not None:
        drawn = sample_dataset(dataset, count, held_out, seed, frames)
    else:
        drawn = sample_simulator(tasks, count, held_out, seed, frames)
    drawn.save(run.calibration)
    return CalibrationSet.load(run.calibration)


def sensitivities(
    run: RunFolder,
    policy: "Policy",
    target: Target,
    estimator: "Estimator",
    seed: int,
    resources: "Resources | None" = None,
    compensated: bool = False,
) -> Sensitivities:
    """Estimate all channels and widths, or keep what was estimated in the same way.

    With `compensated`, of the quantizer that `compensating.rounded` rounds plans with. Processes of
    one world share the observations; process 0 writes.
    """
    from qvla_export.pipeline import moments as compensating
    from qvla_export.pipeline.resources import Resources
    from qvla_export.sensitivity.estimators.base import Work, remove_progress

    means = resources or Resources()
    first = means.world.rank == 0
    asked = question(run, policy, target, seed, means.batch_size)
    if compensated:
        asked = compensating.asked(run, asked, target, means)
    journal = run.sensitivities.with_suffix(".progress")
    kept = kept_artifact(run.sensitivities, Sensitivities.load)
    # Process 0 decides, so that none waits for one that has nothing to do.
    if means.world.broadcast(kept is not None and _same(kept, asked, estimator)):
        if first:
            remove_progress(journal)
        return kept or Sensitivities.load(run.sensitivities)
    with Progress(disable=not first) as progress:
        work = Work(journal, bar(progress, f"sensitivities, {estimator.method}"), means.world)
        measured = estimator.table(asked, work)
    if first:
        measured.save(run.sensitivities)
        remove_progress(journal)
    return measured


def question(
    run: RunFolder, policy: "Policy", target: Target, seed: int, batch_size: int = 8
) -> "Question":
    """Return what estimators are asked about a run: its calibration set, the target's quantizer."""
    from calibration.calibration_set import CalibrationSet
    from qvla_export.sensitivity.estimators.base import Question

    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    return Question(
        policy,
        calibration.observations,
        calibration.digest,
        spec_for(target),
        episode_lengths=calibration.episode_lengths,
        seed=seed,
        batch_size=batch_size,
    )


def _same(kept: Sensitivities, asked: "Question", estimator: "Estimator") -> bool:
    """Whether sensitivities are what an estimator would answer."""
    # Files of before settings were recorded: first order with so many probes. Later ones name a
    # bound that is gone; null bounded nothing.
    told, now = kept.settings or {"probes": kept.probes or None}, dict(estimator.settings)
    return (
        (kept.policy_digest, kept.calibration_digest, kept.quantizer, kept.widths, kept.seed)
        == (
            asked.policy.digest,
            asked.calibration_digest,
            asked.quantizer,
            asked.widths,
            asked.seed,
        )
        and kept.method == estimator.method
        and told in (now, {**now, "max_standard_error": None})
    )


def agreement(run: RunFolder, policy: "Policy", pairs: int, seed: int) -> "Agreement":
    """Compare the sensitivities with exact ones on sampled channels and widths."""
    from calibration.calibration_set import CalibrationSet
    from qvla_export.sensitivity.agreement import Agreement, compare_with_exact
    from qvla_export.sensitivity.estimators.first_order import FirstOrder, measure_first_order

    measured = Sensitivities.load(made(run.sensitivities, "sensitivities"))
    require_same("policy and sensitivities", measured.policy_digest, policy.digest, _MEASURE)
    kept = kept_artifact(run.agreement, Agreement.load)
    if kept is not None and (
        (kept.sensitivities_digest, kept.seed) == (measured.digest, seed)
        and len(kept.pairs) == min(pairs, _pairs_in_all(measured))
    ):
        return kept
    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    require_calibration(calibration, measured.calibration_digest, "sensitivities")
    observations = calibration.observations
    table = measured
    if measured.quantizer.needs_moments:
        # What is measured exactly are nearest codes: the estimator is judged, not the rounding.
        nearest = QuantizerSpec(measured.quantizer.rules)
        how = FirstOrder(nearest, measured.widths, measured.probes or None, measured.seed)
        table = measure_first_order(policy, observations, calibration.digest, how)
    with Progress() as progress:
        told = bar(progress, "exact sample")
        compared = compare_with_exact(table, policy, observations, pairs, seed, on_progress=told)
    compared = replace(compared, sensitivities_digest=measured.digest)
    compared.save(run.agreement)
    return compared


def activations(
    run: RunFolder, policy: "Policy", world: "World | None" = None
) -> "ActivationStatistics":
    """Record what the layers are fed, or keep what was recorded on the same.

    Processes of one world share the observations; process 0 writes.
    """
    from calibration.calibration_set import CalibrationSet
    from qvla_export.measurement.distributed import Alone
    from qvla_export.measurement.measure_activations import measure_activations

    world = world or Alone()
    first = world.rank == 0
    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    kept = kept_artifact(run.activations, ActivationStatistics.load)
    same = kept is not None and (
        (kept.policy_digest, kept.calibration_digest) == (policy.digest, calibration.digest)
    )
    if world.broadcast(same):
        return kept or ActivationStatistics.load(run.activations)
    with Progress(disable=not first) as progress:
        told = bar(progress, "activations")
        measured = measure_activations(
            policy, calibration.observations, calibration.digest, told, world
        )
    if first:
        measured.save(run.activations)
    return measured


def plan(
    run: RunFolder,
    setting: Setting,
    target: Target,
    policy_digest: str,
    method: RangeMethod = DEFAULT_METHOD,
    latency: LatencyLimit | None = None,
    request: PlanRequest | None = None,
) -> BitPlan | None:
    """Allocate bits for a setting, leaving a file of the same plan alone; None for float."""
    if setting.kind == "float":
        return None
    measured = Sensitivities.load(made(run.sensitivities, "sensitivities"))
    require_same("policy and sensitivities", measured.policy_digest, policy_digest, _MEASURE)
    if setting.kind == "uniform":
        planned = uniform_plan(
            shapes_of(measured), int(setting.bits), target, policy_digest, _round_to_nearest(target)
        )
    else:
        _require_groups_of(target, measured)
        chosen = request or PlanRequest.for_setting(setting, measured, target)
        planned = chosen.allocate(measured, target, latency)
    if setting.activation_bits is not None:
        planned = _with_activations(run, planned, setting.activation_bits, method)
    planned.save(run.plan(setting))
    return planned


def _require_groups_of(target: Target, measured: Sensitivities) -> None:
    """Refuse sensitivities of scales that the target does not store; its graphs would as well."""
    wanted = {bits: rule.group_size for bits, rule in spec_for(target).rules.items()}
    found = {bits: rule.group_size for bits, rule in measured.quantizer.rules.items()}
    again = f"Measure for this target: qvla sensitivities --target {target.name}."
    require_same("scale groups of sensitivities and target", str(found), str(wanted), again)


def _with_activations(run: RunFolder, planned: BitPlan, bits: int, method: RangeMethod) -> BitPlan:
    fed = ActivationStatistics.load(made(run.activations, "activations"))
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


def load_plan(run: RunFolder, setting: Setting, rounded: bool = True) -> BitPlan | None:
    """Read a setting's plan, with its codes where it has some of its own; None for float.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    if setting.kind == "float":
        return None
    planned = BitPlan.load(made(run.plan(setting), f"plan --setting {setting.name}"))
    from qvla_export.pipeline import moments as compensating

    return compensating.attached(run, setting, planned) if rounded else planned


def _pairs_in_all(measured: Sensitivities) -> int:
    channels = sum(int(values.shape[1]) for values in measured.values.values())
    return len(measured.widths) * channels


def require_calibration(calibration: "CalibrationSet", digest: str, what: str) -> None:
    """Refuse a calibration set that sensitivities or a plan were not made from.

    Held-out observations of another set may be the very ones the plan was fitted to.

    Raises:
        ArtifactMismatch: naming both digests.
    """
    require_same(f"{what} and calibration set", digest, calibration.digest, _MEASURE_AGAIN)


def _round_to_nearest(target: Target) -> QuantizerSpec:
    """The target's own containers, scales from the largest weight: the plain baseline."""
    rules = spec_for(target).rules
    return QuantizerSpec({bits: replace(rule, scale="max") for bits, rule in rules.items()})
