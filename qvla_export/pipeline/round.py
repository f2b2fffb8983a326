"""The step that makes codes of a plan that make up for each other's errors."""

from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.calibrate import load_calibration, require_calibration
from qvla_export.pipeline.moments import moments
from qvla_export.pipeline.plan import load_plan
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.work.log import ArtifactWork, recorded_work, short
from qvla_export.quantizer.round_plan import round_plan, with_rounding
from qvla_export.quantizer.rounding import Rounding
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from qvla_export.pipeline.resources import Resources
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.moments import Moments
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.observation import Observation

_WHOLE = "codes are tuned with the whole policy in memory, this one's weights are on disk"


def round_setting(
    run: RunFolder,
    setting: Setting,
    policy: "Policy",
    resources: "Resources | None" = None,
    on_progress: OnProgress = ignore,
) -> "BitPlan | None":
    """Make the codes of a setting's plan, or keep those of the same plan and moments.

    Of a policy whose weights were left on disk, moments are measured, used and dropped a few layers
    at a time, unless the run has them.

    Returns:
        The plan with its codes; None for float; a plan of nearest codes as it is.

    Raises:
        QvlaError: what is needed exceeds the bound of memory.
    """
    from qvla_export.policies.layers import weights_on_disk

    planned = load_plan(run, setting, with_rounded_codes=False)
    if planned is None or not planned.quantizer.needs_moments:
        return planned
    if weights_on_disk(policy) and not run.moments.is_file():
        return _round_spans(run, setting, policy, planned, resources, on_progress)
    fed = moments(run, policy, resources, on_progress=on_progress)
    work = f"rounding, {setting.name}"
    codes = _current(run, setting, planned, fed.digest)
    if codes is None:
        with recorded_work(
            _record(run, setting, planned, fed.digest, run.moments), on_progress
        ) as hear:
            seen = load_calibration(run).observations
            codes = coded_plan(policy, planned, fed, seen, bar(hear, work)).rounding
            assert codes is not None
            codes.save(run.rounding(setting))
        finish(on_progress, work, kept=False)
    else:
        finish(on_progress, work, kept=True)
    return with_rounding(planned, codes)


def coded_plan(
    policy: "Policy",
    planned: "BitPlan",
    fed: "Moments",
    observations: "Sequence[Observation]",
    tell: "Callable[[int, int], None] | None" = None,
) -> "BitPlan":
    """Return a plan with the codes, and the scales, that its quantizer makes.

    Args:
        policy: the full-precision policy.
        planned: without codes.
        fed: moments of the observations.
        observations: to tune codes on, where the quantizer does.
        tell: called with (layers done, layers in all), of tuned codes with steps instead.
    """
    from qvla_export.measurement.code_tuning import tune_codes
    from qvla_export.policies.layers import weights_on_disk

    if not planned.quantizer.tuned_codes:
        return round_plan(policy, planned, fed, tell)
    if weights_on_disk(policy):
        raise QvlaError(f"{_WHOLE}; give it more memory, or plan without --tune-codes")
    coded = round_plan(policy, planned, fed)
    return tune_codes(policy, coded, observations, tell=tell)


def _round_spans(
    run: RunFolder,
    setting: Setting,
    policy: "Policy",
    planned: "BitPlan",
    resources: "Resources | None",
    on_progress: OnProgress,
) -> "BitPlan":
    from qvla_export.measurement.moment_bounds import MomentSettings
    from qvla_export.measurement.round_spans import SpanRounding, round_spans
    from qvla_export.pipeline.resources import Resources

    if planned.quantizer.tuned_codes:
        raise QvlaError(f"{_WHOLE}; give it more memory, or plan without --tune-codes")
    means, calibration = resources or Resources(), load_calibration(run)
    path = run.rounding(setting)
    spans = SpanRounding(
        policy,
        planned,
        calibration.observations,
        calibration.digest,
        MomentSettings(batch_size=means.batch_size, max_bytes=means.max_bytes),
        path.with_suffix(".parts"),
        means.world,
    )
    if planned.calibration_digest is not None:
        require_calibration(calibration, planned.calibration_digest, "plan")
    work = f"rounding, {setting.name}"
    codes = _current(run, setting, planned, spans.moments_digest)
    if codes is None:
        record = _record(run, setting, planned, spans.moments_digest, run.calibration)
        with recorded_work(record, on_progress) as hear:
            finished = len(spans.files.finished())
            if finished:
                finish(hear, f"{work}: {finished} of {len(planned.widths)} layers", kept=True)
            round_spans(spans, bar(hear, work)).save(path)
        codes = Rounding.load(path)
        finish(on_progress, work, kept=False)
    else:
        finish(on_progress, work, kept=True)
    spans.files.remove()
    return with_rounding(planned, codes)


def _current(
    run: RunFolder, setting: Setting, planned: "BitPlan", moments_digest: str
) -> Rounding | None:
    digests = (planned.digest, moments_digest)
    return load_if_current(
        run.rounding(setting),
        Rounding.load,
        lambda old: (old.plan_digest, old.moments_digest) == digests,
    )


def _record(
    run: RunFolder, setting: Setting, planned: "BitPlan", moments_digest: str, source: Path
) -> ArtifactWork:
    options = {"plan": short(planned.digest), "moments": short(moments_digest)}
    return ArtifactWork(run, run.rounding(setting), options, (run.plan(setting), source))
