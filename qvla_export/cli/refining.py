"""The stage within `qvla plan` that plans again on the quantized policy."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.progress import Progress

from qvla_export.artifacts import remove_leftovers
from qvla_export.cli.keeping import bar, kept_artifact
from qvla_export.errors import QvlaError
from qvla_export.moments import Moments
from qvla_export.plan import BitPlan
from qvla_export.run_folder import RunFolder, Setting, made
from qvla_export.sensitivity import Sensitivities

if TYPE_CHECKING:
    from calibration.samples import CalibrationSet
    from qvla_export.observation import Observation
    from qvla_export.policies.oft import OftPolicy

# Of the calibration observations: held aside to decide by.
_DECIDING_SHARE = 0.25


def refined(
    run: RunFolder,
    setting: Setting,
    policy: "OftPolicy | None",
    measured: Sensitivities,
    planned: BitPlan,
    allocate: Callable[[Sensitivities], BitPlan],
    rounds: int,
) -> BitPlan:
    """Refine a plan on the calibration observations, or keep what was made of the same plan.

    A killed run goes on where it was.

    Raises:
        QvlaError: there is no policy, or there are too few observations.
    """
    if policy is None:
        raise QvlaError(f"refining {setting.name} runs the policy; name it with --policy")
    from calibration.samples import CalibrationSet
    from qvla_export.cli.stages import require_calibration
    from qvla_export.refinement import Evidence, is_refined, refine_plan

    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    require_calibration(calibration, measured.calibration_digest, "sensitivities")
    kept = kept_artifact(run.plan(setting), BitPlan.load)
    if kept is not None and is_refined(kept, planned, rounds):
        return replace(kept, activations=None)
    fitted, deciding = _divided(calibration)
    codes = planned.quantizer.needs_moments
    moments = _moments(run, policy, fitted, calibration.digest) if codes else None
    journal = run.plan(setting).with_suffix(".progress")
    if journal.parent.is_dir():
        remove_leftovers(journal)  # of a kill while it was written
    with Progress() as progress:
        told = bar(progress, "refinement")
        evidence = Evidence(fitted, deciding, moments)
        return refine_plan(policy, evidence, measured, planned, allocate, rounds, journal, told)


def _divided(
    calibration: "CalibrationSet",
) -> tuple[Sequence["Observation"], Sequence["Observation"]]:
    """Return observations to plan on, and the last quarter to decide by: of whole episodes.

    Raises:
        QvlaError: there are fewer than two episodes.
    """
    observations = calibration.observations
    lengths = calibration.episode_lengths or (1,) * len(observations)
    wanted, count = _DECIDING_SHARE * len(observations), 0
    for length in reversed(lengths[1:]):
        if count >= wanted:
            break
        count += length
    if not count:
        raise QvlaError(
            "refining decides by observations of other episodes than it plans on; the calibration "
            f"set has {len(lengths)} episode: draw more with qvla calibrate --count"
        )
    return observations[:-count], observations[-count:]


def _moments(
    run: RunFolder, policy: "OftPolicy", fitted: Sequence["Observation"], digest: str
) -> Moments:
    """Measure the moments of the observations to plan on, or keep what is there."""
    from qvla_export.moment_measurement import measure_moments
    from qvla_export.sharded_sums import remove_journals

    journal = run.fitted_moments.with_suffix(".progress")
    kept = kept_artifact(run.fitted_moments, Moments.load)
    wanted = (policy.digest, digest, len(fitted))
    if kept is None or (kept.policy_digest, kept.calibration_digest, kept.samples) != wanted:
        with Progress() as progress:
            told = bar(progress, "moments to refine with")
            kept = measure_moments(policy, fitted, digest, progress_file=journal, on_progress=told)
        kept.save(run.fitted_moments)
    remove_journals(journal)
    return kept


def remove_progress(run: RunFolder, setting: Setting) -> None:
    """Remove what a refinement kept, once the plan is safe."""
    run.plan(setting).with_suffix(".progress").unlink(missing_ok=True)


def rounds_of(planned: BitPlan) -> list[str]:
    """Say what each round of a plan's refinement found; none where it was not refined."""
    from qvla_export.refinement import rounds_in

    return [
        f"action error {found.error_before:.4g} -> {found.error_after:.4g} "
        f"+- {found.standard_error:.2g}, {found.changed} channels changed"
        f"{'' if found.accepted else ', not taken'}"
        for found in rounds_in(planned)
    ]
