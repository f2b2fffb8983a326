"""The step that smooths a policy: factors of every strength, and what each does to the action."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.progress import Progress

from qvla_export.pipeline.run_folder import RunFolder, made

if TYPE_CHECKING:
    from torch import Tensor

    from qvla_export.policies.base import Policy
    from qvla_export.policies.smoothing import Migration
    from qvla_export.shared.target import Target


def smoothing_trials(
    run: RunFolder,
    policy: "Policy",
    target: "Target",
    strengths: Sequence[float],
    powers_of_two: bool,
) -> "dict[float | None, tuple[dict[Migration, Tensor], float]]":
    """Factors and action error of every strength; None is the policy as it was."""
    from calibration.calibration_set import CalibrationSet
    from qvla_export.measurement.smoothing import input_maxima, smoothing_error
    from qvla_export.policies.smoothing import smoothing_factors

    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    observations, migrations = calibration.observations, policy.migrations()
    tried: dict[float | None, tuple[dict[Migration, Tensor], float]] = {}
    with Progress(transient=True) as progress:
        task = progress.add_task("smoothing", total=len(strengths) + 2)
        maxima = input_maxima(policy, observations)
        progress.advance(task)
        for value in (None, *strengths):
            factors: dict[Migration, Tensor] = {}
            if value is not None:
                factors = smoothing_factors(policy.module, migrations, maxima, value, powers_of_two)
            error = smoothing_error(policy, factors, observations, calibration.digest, target)
            tried[value] = factors, error
            progress.advance(task)
    return tried
