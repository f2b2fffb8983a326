"""Stages of a run whose codes depend on what the layers are fed: moments, rounding."""

from dataclasses import replace
from typing import TYPE_CHECKING

from rich.progress import Progress

from qvla_export.cli import stages
from qvla_export.cli.keeping import bar, kept_artifact
from qvla_export.moments import Moments
from qvla_export.quantize import compensated_spec
from qvla_export.rounded_plan import round_plan, with_rounding
from qvla_export.rounding import Rounding
from qvla_export.run_folder import RunFolder, Setting, made

if TYPE_CHECKING:
    from qvla_export.distributed import World
    from qvla_export.estimators.base import Question
    from qvla_export.plan import BitPlan
    from qvla_export.policies.base import Policy
    from qvla_export.target import Target


def moments(run: RunFolder, policy: "Policy", world: "World | None" = None) -> Moments:
    """Measure what the layers are fed and what their outputs are worth, or keep what is there.

    Processes of one world share the observations; process 0 writes.
    """
    from calibration.samples import CalibrationSet
    from qvla_export.distributed import Alone
    from qvla_export.moment_measurement import MomentSettings, measure_moments
    from qvla_export.sharded_sums import remove_journals

    world = world or Alone()
    first = world.rank == 0
    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    settings, journal = MomentSettings(), run.moments.with_suffix(".progress")
    kept = kept_artifact(run.moments, Moments.load)
    same = kept is not None and (
        (kept.policy_digest, kept.calibration_digest, kept.probes, kept.seed)
        == (policy.digest, calibration.digest, settings.probes, settings.seed)
    )
    if not world.told(same):
        with Progress(disable=not first) as progress:
            told = bar(progress, "moments")
            digest = calibration.digest
            kept = measure_moments(
                policy, calibration.observations, digest, settings, journal, told, world
            )
        if first:
            kept.save(run.moments)
    if first:
        remove_journals(journal)
    return kept or Moments.load(run.moments)


def asked(
    run: RunFolder, question: "Question", target: "Target", world: "World | None" = None
) -> "Question":
    """Return a question about the compensating quantizer instead of the nearest codes."""
    found = moments(run, question.policy, world)
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
