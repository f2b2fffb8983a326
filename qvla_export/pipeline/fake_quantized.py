"""Settings that no engine runs, or need not: plans applied in torch and judged like bundles."""

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.allocation.setting import Setting, parse_setting
from qvla_export.pipeline.plan import load_plan, require_calibration
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.reuse import kept_artifact
from qvla_export.pipeline.run_folder import RunFolder, made
from qvla_export.shared.artifacts import read_json, write_json

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from engines.drift import ActionDrift
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.action import ActionChunk
    from qvla_export.shared.observation import Observation


class SimulatedPolicy:
    """A float policy that acts as a plan has it until it is closed."""

    def __init__(self, policy: "Policy", plan: "BitPlan") -> None:
        from qvla_export.policies.layers import fake_quantized

        self._policy = policy
        self._stack = ExitStack()
        self._stack.enter_context(fake_quantized(policy, plan))

    def infer(self, observation: "Observation") -> "ActionChunk":
        """Act on one observation."""
        return self._policy.infer(observation)

    def close(self) -> None:
        """Give the policy its own weights back."""
        self._stack.close()


@dataclass(frozen=True)
class SimulatedSource:
    """Opens a run's setting in torch; picklable, so that worker processes open it themselves."""

    policy: PolicySource
    run: Path
    setting: str

    def __call__(self) -> SimulatedPolicy:
        """Load checkpoint and plan."""
        plan = load_plan(RunFolder(self.run), parse_setting(self.setting))
        assert plan is not None
        return SimulatedPolicy(self.policy(), plan)  # type: ignore[arg-type]  # a checkpoint opens as a Policy


def action_error(run: RunFolder, setting: Setting, policy: "Policy") -> dict[str, Any]:
    """Compare a planned setting in torch with the float policy on the held-out observations."""
    from calibration.calibration_set import CalibrationSet
    from engines.drift import action_drift
    from qvla_export.graph.golden import golden_actions

    plan = load_plan(run, setting)
    assert plan is not None
    path = run.action_error(setting)
    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    if plan.calibration_digest is not None:
        require_calibration(calibration, plan.calibration_digest, "plan")
    identity = {
        "setting": setting.name,
        "plan_digest": judged_digest(plan),
        "calibration_digest": calibration.digest,
        "runtime": "torch",
    }
    kept = kept_artifact(path, lambda p: read_json(p, "action error"))
    if kept is not None and all(kept.get(name) == value for name, value in identity.items()):
        return dict(kept)
    golden = golden_actions(policy, plan, calibration.held_out)
    unit = policy.processor.statistics.action.scale()
    bins = policy.processor.spec.action_bins
    error = action_drift(golden.full_precision, golden.reference, unit, bins)
    value = {**identity, **error_figures(error, golden.reference[0].size)}
    write_json(path, value)
    return value


def error_figures(error: "ActionDrift", numbers: int) -> dict[str, Any]:
    """Return what every action error states; a chunk has `numbers` of them."""
    return {
        "held_out": error.observations,
        # Squared error of a whole chunk, averaged over observations.
        "mse": error.rms**2 * numbers,
        "rms": error.rms,
        "mean_abs_normalized": error.mean_normalized.tolist(),
        "max_abs_normalized": error.max_normalized.tolist(),
        "mean_abs_physical": error.mean_physical.tolist(),
        "cosine": error.cosine,
    }


def judged_digest(plan: "BitPlan") -> str:
    """Return what tells a plan from others: of its codes, where it has some of its own."""
    return plan.digest if plan.rounding is None else plan.rounding.digest


def rollouts(
    run: RunFolder, setting: Setting, config: "RolloutConfig", source: PolicySource, workers: int
) -> "Evaluation":
    """Run a planned setting closed loop in torch beside the float policy."""
    from calibration.benchmarks.evaluation import load_evaluation
    from calibration.benchmarks.rollouts import evaluate

    plan = load_plan(run, setting)
    assert plan is not None
    path = run.evaluation(setting)
    kept = kept_artifact(path, load_evaluation)
    digest = judged_digest(plan)
    if kept is not None and (kept.digest, kept.config) == (digest, config.runnable()):
        return kept
    single = replace(source, threads=1)
    return evaluate(
        f"{setting.name}, torch",
        digest,
        SimulatedSource(single, run.root, setting.name),
        config,
        path,
        reference=single,
        workers=workers,
        reference_digest=plan.policy_digest,
    )
