"""Settings that no engine runs, or need not: plans applied in torch and judged like bundles."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.allocation.setting import Setting, parse_setting
from qvla_export.pipeline.action_error import (
    ErrorSubject,
    HeldOutError,
    held_out_error,
    load_error_if_current,
)
from qvla_export.pipeline.calibrate import load_calibration, require_calibration
from qvla_export.pipeline.plan import digest_of_codes, load_plan
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current
from qvla_export.pipeline.work.judgements import error_work, rollout_work
from qvla_export.pipeline.work.log import recorded_work

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from engines.drift import ActionDrift
    from qvla_export.graph.golden import TokenDivergence
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.action import ActionChunk
    from qvla_export.shared.observation import Observation


class FakeQuantizedPolicy:
    """A float policy that acts as a plan has it until it is closed."""

    def __init__(self, policy: "Policy", plan: "BitPlan") -> None:
        """Replace the policy's weights by the plan's, in place.

        Raises:
            PlanMismatch: the plan is of another policy.
        """
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
class FakeQuantizedSource:
    """Opens a run's setting in torch; picklable, so that worker processes open it themselves."""

    policy: PolicySource
    run: Path
    setting: str

    def __call__(self) -> FakeQuantizedPolicy:
        """Load checkpoint and plan.

        Raises:
            QvlaError: either is missing or damaged.
        """
        plan = load_plan(RunFolder(self.run), parse_setting(self.setting))
        assert plan is not None
        return FakeQuantizedPolicy(self.policy(), plan)  # type: ignore[arg-type]  # a checkpoint opens as a Policy


def action_error(
    run: RunFolder, setting: Setting, policy: "Policy", on_progress: OnProgress = ignore
) -> HeldOutError:
    """Compare a planned setting in torch with the float policy on the held-out observations.

    Raises:
        ArtifactError: plan or calibration set is missing or damaged.
        ArtifactMismatch: the plan was made from another calibration set.
    """
    plan = load_plan(run, setting)
    assert plan is not None
    path = run.action_error(setting)
    calibration = load_calibration(run)
    if plan.calibration_digest is not None:
        require_calibration(calibration, plan.calibration_digest, "plan")
    digest = digest_of_codes(plan)
    subject = ErrorSubject(setting.name, "plan", digest, calibration.digest, "torch")
    earlier = load_error_if_current(path, subject)
    if earlier is not None:
        finish(on_progress, "action error", kept=True)
        return earlier
    with recorded_work(error_work(run, path, subject, run.plan(setting)), on_progress):
        drift = judge_plan(policy, plan, calibration.held_out)
        chunk_numbers = drift.actions // drift.observations * len(drift.rms_normalized)
        divergence = plan_divergence(policy, plan, calibration.held_out)
        error = held_out_error(subject, drift, chunk_numbers, divergence)
        error.save(path)
    finish(on_progress, "action error", kept=False)
    return error


def judge_plan(
    policy: "Policy", plan: "BitPlan", observations: "Sequence[Observation]"
) -> "ActionDrift":
    """Compare a plan in torch with the float policy, whole in memory, on any observations."""
    from engines.drift import action_drift
    from qvla_export.graph.golden import golden_actions

    golden = golden_actions(policy, plan, observations)
    unit = policy.processor.statistics.action.scale()
    bins = policy.processor.spec.action_bins
    return action_drift(golden.full_precision, golden.reference, unit, bins)


def plan_divergence(
    policy: "Policy", plan: "BitPlan | None", observations: "Sequence[Observation]"
) -> "TokenDivergence | None":
    """Return eq. 2's divergence of a plan in torch; None without a plan, tokens or weights.

    Engines put out actions, not distributions: torch computes it with the codes they compute with.
    """
    from qvla_export.graph.golden import token_divergence
    from qvla_export.policies.layers import fake_quantized, weights_on_disk

    if plan is None or weights_on_disk(policy):
        return None
    return token_divergence(policy, observations, partial(fake_quantized, policy, plan))


def rollouts(
    run: RunFolder,
    setting: Setting,
    config: "RolloutConfig",
    source: PolicySource,
    workers: int,
    on_progress: OnProgress = ignore,
) -> "Evaluation":
    """Run a planned setting closed loop in torch beside the float policy, or keep what was run.

    Raises:
        QvlaError: a policy does not open or act, or a worker died.
    """
    from calibration.benchmarks.evaluation import load_evaluation
    from calibration.benchmarks.rollouts import RolloutJob, evaluate

    plan = load_plan(run, setting)
    assert plan is not None
    path = run.evaluation(setting)
    digest, work = digest_of_codes(plan), f"rollouts, {setting.name}, torch"
    earlier = load_if_current(
        path, load_evaluation, lambda old: (old.digest, old.config) == (digest, config.runnable())
    )
    if earlier is not None:
        finish(on_progress, work, kept=True)
        return earlier
    single = replace(source, threads=1)
    job = RolloutJob(
        f"{setting.name}, torch",
        digest,
        FakeQuantizedSource(single, run.root, setting.name),
        config,
        reference=single,
        reference_digest=plan.policy_digest,
    )
    with recorded_work(rollout_work(run, path, job, run.plan(setting)), on_progress) as hear:
        evaluation = evaluate(job, path, workers, bar(hear, work))
    finish(on_progress, work, kept=False)
    return evaluation
