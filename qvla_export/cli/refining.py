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
    from qvla_export.refinement import Evidence

# Of the calibration observations: held aside to decide by, where codes are the nearest.
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
    from qvla_export.refinement import is_refined, refine_plan

    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    require_calibration(calibration, measured.calibration_digest, "sensitivities")
    kept = kept_artifact(run.plan(setting), BitPlan.load)
    if kept is not None and is_refined(kept, planned, rounds):
        return replace(kept, activations=None)
    journal = run.plan(setting).with_suffix(".progress")
    if journal.parent.is_dir():
        remove_leftovers(journal)  # of a kill while it was written
    evidence = _evidence(run, policy, calibration, planned.quantizer.needs_moments)
    with Progress() as progress:
        told = bar(progress, "refinement")
        return refine_plan(policy, evidence, measured, planned, allocate, rounds, journal, told)


def _evidence(
    run: RunFolder, policy: "OftPolicy", calibration: "CalibrationSet", codes: bool
) -> "Evidence":
    """Say what is decided by: a quarter of the observations, or each half with codes of the other.

    Args:
        run: where moments of the halves are kept.
        policy: what is quantized.
        calibration: its observations are divided.
        codes: whether the quantizer makes its codes from moments.

    Raises:
        QvlaError: there are fewer than two episodes.
    """
    from qvla_export.refinement import Evidence, Trial

    if not codes:
        fitted, deciding = _divided(calibration, _DECIDING_SHARE)
        return Evidence(fitted, (Trial(deciding),))
    halves = _divided(calibration, 0.5)
    moments = [
        _moments(run, half, policy, observations, calibration.digest)
        for half, observations in enumerate(halves)
    ]
    return Evidence(
        calibration.observations, (Trial(halves[1], moments[0]), Trial(halves[0], moments[1]))
    )


def _divided(
    calibration: "CalibrationSet", share: float
) -> tuple[Sequence["Observation"], Sequence["Observation"]]:
    """Return the observations up to an episode's end, and the last, at least a share of all.

    Raises:
        QvlaError: there are fewer than two episodes.
    """
    observations = calibration.observations
    lengths = calibration.episode_lengths or (1,) * len(observations)
    count = 0
    for length in reversed(lengths[1:]):
        if count >= share * len(observations):
            break
        count += length
    if not count:
        raise QvlaError(
            "refining decides by observations of other episodes than it plans on; the calibration "
            f"set has {len(lengths)} episode: draw more with qvla calibrate --count"
        )
    return observations[:-count], observations[-count:]


def _moments(
    run: RunFolder,
    half: int,
    policy: "OftPolicy",
    observations: Sequence["Observation"],
    digest: str,
) -> Moments:
    """Measure the moments of one half of the observations, or keep what is there."""
    from qvla_export.moment_measurement import measure_moments
    from qvla_export.sharded_sums import remove_journals

    path = run.half_moments(half)
    journal = path.with_suffix(".progress")
    kept = kept_artifact(path, Moments.load)
    wanted = (policy.digest, digest, len(observations))
    if kept is None or (kept.policy_digest, kept.calibration_digest, kept.samples) != wanted:
        with Progress() as progress:
            told = bar(progress, f"moments of half {half + 1}")
            kept = measure_moments(
                policy, observations, digest, progress_file=journal, on_progress=told
            )
        kept.save(path)
    remove_journals(journal)
    return kept


def remove_progress(run: RunFolder, setting: Setting) -> None:
    """Remove what a refinement kept, once the plan is safe."""
    run.plan(setting).with_suffix(".progress").unlink(missing_ok=True)


def rounds_of(planned: BitPlan) -> list[str]:
    """Say what each round of a plan's refinement found; none where it was not refined."""
    from qvla_export.refinement import rounds_in

    return [
        f"action error {_joined(found.errors_before)} -> {_joined(found.errors_after)}, "
        f"{found.changed} channels changed{'' if found.accepted else ', not taken'}"
        for found in rounds_in(planned)
    ]


def _joined(errors: Sequence[float]) -> str:
    return ", ".join(f"{error:.4g}" for error in errors)
