"""Stages of a run whose codes depend on what the layers are fed: moments, rounding."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline import plan as stages
from qvla_export.pipeline.reuse import bar, kept_artifact
from qvla_export.pipeline.run_folder import RunFolder, made
from qvla_export.quantizer.moments import Moments
from qvla_export.quantizer.quantize import compensated_spec
from qvla_export.quantizer.round_plan import round_plan, with_rounding
from qvla_export.quantizer.rounding import Rounding

if TYPE_CHECKING:
    from qvla_export.pipeline.resources import Demand, Resources
    from qvla_export.policies.base import Policy
    from qvla_export.policies.layers import Layers
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.sensitivity.estimators.base import Question
    from qvla_export.shared.target import Target


def moments(
    run: RunFolder,
    policy: "Policy",
    resources: "Resources | None" = None,
    largest_block: int | None = None,
) -> Moments:
    """Measure what the layers are fed and what their outputs are worth, or keep what is there.

    Processes of one world share the observations; process 0 writes. Of a policy whose weights were
    left on disk, the blocks are the largest that fit into the bound unless told.
    """
    from calibration.calibration_set import CalibrationSet
    from qvla_export.measurement.measure_moments import measure_moments
    from qvla_export.measurement.moment_bounds import MomentSettings, fitting_block
    from qvla_export.measurement.sharded_sums import remove_journals
    from qvla_export.measurement.streamed import weights_on_disk
    from qvla_export.pipeline.resources import Resources

    means = resources or Resources()
    world, first = means.world, means.world.rank == 0
    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    observations, digest = calibration.observations, calibration.digest
    bound = means.max_bytes
    settings, journal = MomentSettings(batch_size=means.batch_size, max_bytes=bound), _journal(run)
    kept = kept_artifact(run.moments, Moments.load)
    same = kept is not None and (
        (kept.policy_digest, kept.calibration_digest, kept.probes, kept.seed)
        == (policy.digest, digest, settings.probes, settings.seed)
        and (largest_block is None or kept.has_blocks(largest_block))
    )
    if not world.broadcast(same):
        if largest_block is None and bound is not None and weights_on_disk(policy):
            largest_block = fitting_block(policy, observations, settings, world)
        if largest_block is not None:
            settings = replace(settings, largest_block=largest_block)
        with Progress(disable=not first) as progress:
            told = bar(progress, f"moments, blocks of {settings.largest_block}")
            kept = measure_moments(policy, observations, digest, settings, journal, told, world)
        if first:
            kept.save(run.moments)
    if first:
        remove_journals(journal)
    return kept or Moments.load(run.moments)


def moment_demand(largest_block: int | None = None) -> "Demand":
    """Return what measuring moments takes of memory."""
    from qvla_export.measurement.moment_bounds import DEFAULT_MOMENTS, moment_needs, moment_sums
    from qvla_export.pipeline.resources import Demand

    settings = DEFAULT_MOMENTS
    if largest_block is not None:
        settings = replace(settings, largest_block=largest_block)

    def held_of(layers: "Layers") -> int:
        return sum(array.nbytes for array in moment_sums(layers, settings).values())

    return Demand(lambda layers, moved: moment_needs(layers, moved, settings), held_of)


def _journal(run: RunFolder) -> Path:
    return run.moments.with_suffix(".progress")


def asked(
    run: RunFolder, question: "Question", target: "Target", resources: "Resources | None" = None
) -> "Question":
    """Return a question about the compensating quantizer instead of the nearest codes."""
    found = moments(run, question.policy, resources)
    return replace(question, quantizer=compensated_spec(target), moments=found)


def rounded(run: RunFolder, setting: Setting, policy: "Policy") -> "BitPlan | None":
    """Make the codes of a setting's plan, or keep those of the same plan and moments.

    None for float; a plan of nearest codes is returned as it is.
    """
    planned = stages.load_plan(run, setting, rounded=False)
    if planned is None or not planned.quantizer.needs_moments:
        return planned
    found = moments(run, policy)
    kept = kept_artifact(run.rounding(setting), Rounding.load)
    if kept is not None and (
        (kept.plan_digest, kept.moments_digest) == (planned.digest, found.digest)
    ):
        return with_rounding(planned, kept)
    with Progress() as progress:
        made_plan = round_plan(policy, planned, found, bar(progress, "rounding"))
    assert made_plan.rounding is not None
    made_plan.rounding.save(run.rounding(setting))
    return made_plan


def attached(run: RunFolder, setting: Setting, planned: "BitPlan") -> "BitPlan":
    """Return a plan with the codes that were made for it.

    Raises:
        ArtifactError: they are missing.
        ArtifactMismatch: they are of another plan.
    """
    if not planned.quantizer.needs_moments:
        return planned
    path = made(run.rounding(setting), f"round --setting {setting.name}")
    return with_rounding(planned, Rounding.load(path))
