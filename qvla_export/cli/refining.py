"""The stage within `qvla plan` that plans again on the quantized policy."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.progress import Progress

from qvla_export.artifacts import remove_leftovers
from qvla_export.cli.keeping import bar
from qvla_export.errors import QvlaError
from qvla_export.plan import BitPlan
from qvla_export.run_folder import RunFolder, Setting, made
from qvla_export.sensitivity import Sensitivities

if TYPE_CHECKING:
    from qvla_export.policies.oft import OftPolicy


def refined(
    run: RunFolder,
    setting: Setting,
    policy: "OftPolicy | None",
    measured: Sensitivities,
    planned: BitPlan,
    allocate: Callable[[Sensitivities], BitPlan],
    rounds: int,
) -> BitPlan:
    """Refine a plan on the calibration observations; a killed run goes on where it was.

    Raises:
        QvlaError: there is no policy, or its codes are made later from what the layers are fed.
    """
    if policy is None:
        raise QvlaError(f"refining {setting.name} runs the policy; name it with --policy")
    if planned.quantizer.needs_moments:
        raise QvlaError(
            f"refining {setting.name} needs a quantizer that rounds to nearest; the sensitivities "
            "are of codes that make up for each other. Measure again: "
            "qvla sensitivities --quantizer nearest"
        )
    from calibration.samples import CalibrationSet
    from qvla_export.cli.stages import require_calibration
    from qvla_export.refinement import refine_plan

    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    require_calibration(calibration, measured.calibration_digest, "sensitivities")
    journal = run.plan(setting).with_suffix(".progress")
    if journal.parent.is_dir():
        remove_leftovers(journal)  # of a kill while it was written
    with Progress() as progress:
        return refine_plan(
            policy,
            calibration.observations,
            measured,
            planned,
            allocate,
            rounds,
            journal,
            bar(progress, "refinement"),
        )


def remove_progress(run: RunFolder, setting: Setting) -> None:
    """Remove what a refinement kept, once the plan is safe."""
    run.plan(setting).with_suffix(".progress").unlink(missing_ok=True)


def rounds_of(planned: BitPlan) -> list[str]:
    """Say what each round of a plan's refinement found; none where it was not refined."""
    rounds = (planned.allocation or {}).get("refinement", {}).get("rounds", [])
    return [
        f"action error {found['error_before']:.4g} -> {found['error_after']:.4g}, "
        f"{found['changed']} channels changed"
        f"{'' if found['error_after'] < found['error_before'] else ', not taken'}"
        for found in rounds
    ]
