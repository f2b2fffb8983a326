"""The step that says from the calibration set alone how far a plan will move other actions.

A plan's codes fit the observations they were made from, and its channels' errors add up with
their signs. So codes are made again from three quarters of the observations, and what they do to
the action all together, cross terms included, is taken to first order on the fourth; each quarter
in turn. Consecutive observations are of one episode, but where a quarter ends.
"""

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.calibrate import load_calibration, require_calibration
from qvla_export.pipeline.plan import load_plan
from qvla_export.pipeline.progress import OnProgress, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder
from qvla_export.shared.artifacts import write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.observation import Observation

_QUARTERS = 4
# Probes of the action, as sensitivities have them.
_PROBES = 4


@dataclass(frozen=True)
class CrossValidatedError:
    """What is to be expected of a plan's actions on other observations, to first order."""

    # Of the plan, and of the calibration set whose quarters judge each other.
    plan_digest: str
    calibration_digest: str
    # RMS of the normalized actions' error: of all errors together, and if none met another.
    rms: float
    rms_of_channels: float
    # Squared error of all modules over the sum of each module's by itself.
    union_over_modules: float
    # Of each module over the sum of its channels' by themselves.
    union_over_channels: dict[str, float]

    def __str__(self) -> str:
        modules = ", ".join(f"{name} {x:.2f}" for name, x in self.union_over_channels.items())
        return (
            f"predicted action error: RMS {self.rms:.5f} of normalized actions on other episodes "
            f"({self.rms_of_channels:.5f} if channels did not meet)\n"
            f"union error over sum of parts: {self.union_over_modules:.2f} of modules; of the "
            f"channels of {modules}"
        )


def predict_error(
    run: RunFolder, setting: Setting, policy: "Policy", on_progress: OnProgress = ignore
) -> CrossValidatedError:
    """Predict a planned setting's action error on observations that no step was made from.

    It is kept beside the plan, where a report finds it.

    Raises:
        QvlaError: there is no plan, or there are fewer observations than quarters.
    """
    from qvla_export.measurement.backward import Probes
    from qvla_export.measurement.plan_deviation import PlanDeviation, plan_deviation

    plan, calibration = load_plan(run, setting, with_rounded_codes=False), load_calibration(run)
    if plan is None:
        raise QvlaError(f"{setting.name} rounds nothing, so there is no error to predict")
    if plan.calibration_digest is not None:
        require_calibration(calibration, plan.calibration_digest, "plan")
    seen = calibration.observations
    if len(seen) < _QUARTERS:
        raise QvlaError(
            f"cross-validation needs {_QUARTERS} calibration observations, got {len(seen)}: "
            "qvla calibrate --count"
        )
    pieces: list[PlanDeviation] = []
    bounds = [round(len(seen) * i / _QUARTERS) for i in range(_QUARTERS + 1)]
    for start, stop in itertools.pairwise(bounds):
        coded = _coded(policy, plan, [*seen[:start], *seen[stop:]], calibration.digest)
        probes = Probes(_PROBES, seed=start)
        pieces.append(plan_deviation(policy, coded, seen[start:stop], probes))
    finish(on_progress, f"cross-validation, {setting.name}", kept=False)
    found = PlanDeviation.joined(pieces)
    numbers = policy.infer(seen[0]).actions.size
    predicted = CrossValidatedError(
        plan_digest=plan.digest,
        calibration_digest=calibration.digest,
        rms=float(found.union() / numbers) ** 0.5,
        rms_of_channels=float(found.channel_sums.sum() / numbers) ** 0.5,
        union_over_modules=found.union_over_modules,
        union_over_channels={
            name: found.union_over_channels(layers) for name, layers in found.modules.items()
        },
    )
    write_json(run.predicted_error(setting), asdict(predicted))
    return predicted


def _coded(
    policy: "Policy", plan: "BitPlan", others: "Sequence[Observation]", digest: str
) -> "BitPlan":
    """Return a plan with codes made from some observations; one of nearest codes as it is."""
    from qvla_export.measurement.measure_moments import measure_moments
    from qvla_export.pipeline.round import coded_plan

    if not plan.quantizer.needs_moments:
        return plan
    fed = measure_moments(policy, others, digest)
    return coded_plan(policy, replace(plan, rounding=None), fed, others)
