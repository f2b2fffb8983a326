"""The step that makes codes of a plan that make up for each other's errors."""

from typing import TYPE_CHECKING

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.moments import moments
from qvla_export.pipeline.plan import load_plan
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.work.log import ArtifactWork, recorded_work, short
from qvla_export.quantizer.round_plan import round_plan, with_rounding
from qvla_export.quantizer.rounding import Rounding

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan


def round_setting(
    run: RunFolder, setting: Setting, policy: "Policy", on_progress: OnProgress = ignore
) -> "BitPlan | None":
    """Make the codes of a setting's plan, or keep those of the same plan and moments.

    None for float; a plan of nearest codes is returned as it is.
    """
    planned = load_plan(run, setting, with_rounded_codes=False)
    if planned is None or not planned.quantizer.needs_moments:
        return planned
    fed = moments(run, policy, on_progress=on_progress)
    digests = (planned.digest, fed.digest)
    codes = load_if_current(
        run.rounding(setting),
        Rounding.load,
        lambda old: (old.plan_digest, old.moments_digest) == digests,
    )
    work = f"rounding, {setting.name}"
    if codes is not None:
        finish(on_progress, work, kept=True)
        return with_rounding(planned, codes)
    options = {"plan": short(planned.digest), "moments": short(fed.digest)}
    record = ArtifactWork(run, run.rounding(setting), options, (run.plan(setting), run.moments))
    with recorded_work(record, on_progress) as hear:
        rounded = round_plan(policy, planned, fed, bar(hear, work))
        assert rounded.rounding is not None
        rounded.rounding.save(run.rounding(setting))
    finish(on_progress, work, kept=False)
    return rounded
