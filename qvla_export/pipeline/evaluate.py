"""The steps that judge a run's bundles: action error, closed-loop success, latency."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qvla_export.allocation.setting import Setting
from qvla_export.pipeline.action_error import (
    ErrorSubject,
    HeldOutError,
    held_out_error,
    load_error_if_current,
)
from qvla_export.pipeline.benchmarks.benchmark_policy import BenchmarkPolicySource
from qvla_export.pipeline.calibrate import load_calibration, require_calibration
from qvla_export.pipeline.fake_quantized import plan_divergence
from qvla_export.pipeline.plan import load_plan
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.recommend.held_out_actions import HeldOutActions
from qvla_export.pipeline.run_folder import RunFolder, load_if_current, require_artifact
from qvla_export.pipeline.verify import held_out_reference
from qvla_export.pipeline.work.judgements import error_work, rollout_work
from qvla_export.pipeline.work.log import ArtifactWork, Value, recorded_work, short
from qvla_export.shared.artifacts import require_same

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from jetson.latency.comparison import LatencyComparison
    from qvla_export.policies.base import Policy
    from qvla_export.shared.bundle import Bundle

Weights = Literal["packed", "unpacked"]


def evaluate_policy(
    source: PolicySource,
    config: "RolloutConfig",
    output: Path,
    reference: PolicySource | None = None,
    workers: int = 2,
    on_progress: OnProgress = ignore,
) -> "Evaluation":
    """Run any policy closed loop and write the evaluation; an interrupted one goes on.

    Args:
        source: a checkpoint, a bundle or a server.
        config: the episodes.
        output: JSON file to write.
        reference: a policy to compare every decision with, for the cumulative deviation.
        workers: processes that run episodes.
        on_progress: hears of every episode.

    Raises:
        QvlaError: a policy does not open or act, the episodes are none, or a worker died.
    """
    from calibration.benchmarks.rollouts import RolloutJob, evaluate

    digest = source.digest(source())
    # Opened here as well, so that a bad reference is refused before any episode.
    reference_digest = "" if reference is None else reference.digest(reference())
    name = Path(source.place).name
    policies = [_before(one, config) for one in (source, reference)]
    assert policies[0] is not None
    job = RolloutJob(name, digest, policies[0], config, policies[1], reference_digest)
    return evaluate(job, output, workers, bar(on_progress, f"rollouts, {name}"))


def _before(
    source: PolicySource | None, config: "RolloutConfig"
) -> "PolicySource | BenchmarkPolicySource | None":
    """Return what opens a policy before the configuration's tasks; None where there is none."""
    from calibration.benchmarks.simulators import has_others

    if source is None or not has_others(config.tasks):
        return source
    return BenchmarkPolicySource(source, config.gripper or "as-is")


def evaluated_tasks(names: str | None) -> tuple[str, ...]:
    """Return the tasks of any simulator that an option names; see `choose_benchmark_tasks`.

    Raises:
        QvlaError: a name is unknown.
    """
    from calibration.benchmarks.simulators import choose_benchmark_tasks

    return choose_benchmark_tasks(names)


def action_error(
    run: RunFolder, setting: Setting, policy: "Policy", on_progress: OnProgress = ignore
) -> HeldOutError:
    """Compare a bundle's engine with the float policy on the held-out observations.

    Raises:
        ArtifactError, ArtifactMismatch: bundle, plan and calibration set are not all there, or do
            not belong together.
        VerificationError: the engine's drift from torch with the same fake-quantized weights
            exceeds a threshold, see `engines.thresholds`.
    """
    from engines.load import load_engine, runtime_here
    from engines.targets import find_target
    from engines.verify import verify
    from qvla_export.policies.layers import weights_on_disk

    bundle, path = load_bundle(run, setting), run.action_error(setting)
    calibration = load_calibration(run)
    plan = load_plan(run, setting)
    require_same("bundle and policy", bundle.policy_digest, policy.digest, "Export it again.")
    if plan is not None and plan.calibration_digest is not None:
        require_calibration(calibration, plan.calibration_digest, "plan")
    runtime = runtime_here(find_target(bundle.target))
    subject = ErrorSubject(setting.name, "bundle", bundle.digest, calibration.digest, runtime)
    earlier = load_error_if_current(path, subject)
    answers = run.held_out_actions(setting)
    origin = (bundle.digest, calibration.digest, runtime)
    stored = load_if_current(answers, HeldOutActions.load, lambda old: old.made_from(*origin))
    if earlier is not None and stored is not None:
        finish(on_progress, "action error", kept=True)
        return earlier
    with recorded_work(error_work(run, path, subject, bundle.path), on_progress):
        reference = held_out_reference(bundle, policy, plan, calibration.held_out)
        kept = not weights_on_disk(policy)
        with load_engine(bundle, runtime=runtime, keep_loaded=kept) as engine:
            verdict = verify(bundle, engine, reference)
        drift = verdict.action_error
        assert drift is not None
        _, horizon, dimensions = reference.actions.shape
        divergence = plan_divergence(policy, plan, calibration.held_out)
        numbers, worst = horizon * dimensions, verdict.drift.worst
        error = held_out_error(subject, drift, numbers, divergence, worst)
        assert reference.full_precision is not None
        HeldOutActions(*origin, verdict.actions, reference.full_precision).save(answers)
        error.save(path)
    finish(on_progress, "action error", kept=False)
    return error


def rollouts(
    run: RunFolder,
    setting: Setting,
    config: "RolloutConfig",
    source: PolicySource,
    workers: int,
    on_progress: OnProgress = ignore,
) -> "Evaluation":
    """Run a bundle closed loop beside the float policy of `source`, or keep what was run.

    Under a control, the bundle runs alone, and its evaluation is the run's for that control.

    Raises:
        QvlaError: the bundle is missing, a policy does not act, or a worker died.
    """
    from calibration.benchmarks.evaluation import load_evaluation
    from calibration.benchmarks.rollouts import RolloutJob, evaluate
    from engines.load import runtime_here
    from engines.targets import find_target

    path = run.evaluation(setting) if config.control == "none" else run.control(config.control)
    bundle = load_bundle(run, setting)
    name = setting.name if config.control == "none" else f"{setting.name}, {config.control}"
    work = f"rollouts, {name}"
    earlier = load_if_current(
        path,
        load_evaluation,
        lambda old: (old.digest, old.config) == (bundle.digest, config.runnable()),
    )
    if earlier is not None:
        # A kill between writing the result and removing its journal leaves the journal.
        path.with_name(path.name + ".partial").unlink(missing_ok=True)
        finish(on_progress, work, kept=True)
        return earlier
    runtime = runtime_here(find_target(bundle.target))
    job = RolloutJob(
        name,
        bundle.digest,
        PolicySource(str(bundle.path), threads=1, runtime=runtime),
        config,
        reference=None if config.control != "none" else source,
        reference_digest=bundle.policy_digest,
    )
    with recorded_work(rollout_work(run, path, job, bundle.path), on_progress) as hear:
        evaluation = evaluate(job, path, workers, bar(hear, work))
    finish(on_progress, work, kept=False)
    return evaluation


@dataclass(frozen=True)
class _Contender:
    """One engine of a latency profile."""

    name: str
    bundle: "Bundle"
    weights: Weights
    conditions: str


def latency(
    run: RunFolder,
    settings: Sequence[Setting],
    samples: int,
    threads: int | None,
    on_progress: OnProgress = ignore,
) -> "LatencyComparison":
    """Profile all bundles interleaved; the first is the baseline.

    Planned ones are measured with packed weights and with weights unpacked at load, the last of
    them also over real HTTP.

    Args:
        run: has the bundles and a calibration set.
        settings: whose bundles, in this order.
        samples: actions of each.
        threads: CPU threads of each engine; None for one a core.
        on_progress: hears of every action.

    Raises:
        ArtifactError: a bundle or the calibration set is missing or damaged.
    """
    from jetson.latency.comparison import LatencyComparison

    contenders = _contenders(run, settings, threads)
    # Baselines are not what one would serve, unless there is nothing else.
    names = [setting.name for setting in settings]
    served = [*names, *(s.name for s in settings if s.kind != "uniform")][-1]
    earlier = load_if_current(
        run.latency,
        LatencyComparison.load,
        lambda old: _same_profiles(old, contenders, served, samples),
    )
    if earlier is not None:
        finish(on_progress, "latency", kept=True)
        return earlier
    calibration = load_calibration(run)
    options: dict[str, Value] = {
        "--settings": ",".join(names),
        "--samples": samples,
        "--threads": threads,
        **{c.name: short(c.bundle.digest) for c in contenders},
    }
    bundles = tuple(run.bundle(setting) for setting in settings)
    with recorded_work(ArtifactWork(run, run.latency, options, bundles), on_progress) as hear:
        comparison = _profile(contenders, served, calibration.held_out, samples, threads, hear)
        comparison.save(run.latency)
    finish(on_progress, "latency", kept=False)
    return comparison


def load_bundle(run: RunFolder, setting: Setting) -> "Bundle":
    """Read and verify a setting's bundle.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from qvla_export.shared.bundle import Bundle

    return Bundle.load(require_artifact(run.bundle(setting), f"export --setting {setting.name}"))


def _contenders(
    run: RunFolder, settings: Sequence[Setting], threads: int | None
) -> list[_Contender]:
    where = "all cores" if threads is None else f"{threads} threads"
    bundles = {setting.name: load_bundle(run, setting) for setting in settings}
    planned = [setting.name for setting in settings if setting.kind == "planned"]
    return [
        *(_Contender(n, b, "packed", f"{where}, packed") for n, b in bundles.items()),
        *(
            _Contender(f"{n} unpacked", bundles[n], "unpacked", f"{where}, unpacked")
            for n in planned
        ),
    ]


def _profile(
    contenders: Sequence[_Contender],
    served: str,
    observations: Sequence[Any],
    samples: int,
    threads: int | None,
    on_progress: OnProgress,
) -> "LatencyComparison":
    from engines.load import load_engine
    from jetson.latency.measure import ProfileSubject, profile_latency
    from jetson.policy import EnginePolicy
    from jetson.server import open_server
    from jetson.server_settings import ServerSettings

    policies: dict[str, EnginePolicy] = {}
    subjects: dict[str, ProfileSubject] = {}
    with ExitStack() as stack:
        for contender in contenders:
            start = time.perf_counter()
            engine = stack.enter_context(load_engine(contender.bundle, threads, contender.weights))
            load_ms = (time.perf_counter() - start) * 1e3
            policy = policies[contender.name] = EnginePolicy(contender.bundle, engine)
            subjects[contender.name] = ProfileSubject(policy, load_ms, contender.conditions)
        server = open_server(policies[served], ServerSettings(port=0), warmup=observations[0])
        subjects[f"{served} served"] = ProfileSubject(stack.enter_context(server))
        report = bar(on_progress, "latency")
        return profile_latency(subjects, observations, samples=samples, on_progress=report)


def _same_profiles(
    comparison: "LatencyComparison", contenders: Sequence[_Contender], served: str, samples: int
) -> bool:
    """Whether a comparison is what these would give, but for the time that they take."""
    profiles: Mapping[str, Any] = {profile.name: profile for profile in comparison.profiles}
    if set(profiles) != {*(contender.name for contender in contenders), f"{served} served"}:
        return False
    return {len(profile.samples_ms["total"]) for profile in comparison.profiles} == {
        samples
    } and all(
        (profiles[c.name].conditions, profiles[c.name].bundle_digest)
        == (c.conditions, c.bundle.digest)
        for c in contenders
    )
