"""The step that has another library quantize the policy, and judges it like our own settings."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.action_error import (
    ErrorSubject,
    HeldOutError,
    held_out_error,
    load_error_if_current,
)
from qvla_export.pipeline.calibrate import load_calibration, require_calibration
from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
from qvla_export.pipeline.progress import OnProgress, bar, finish, ignore
from qvla_export.pipeline.run_folder import RunFolder, load_if_current, require_artifact
from qvla_export.pipeline.work.judgements import error_work, rollout_work
from qvla_export.pipeline.work.log import ArtifactWork, Value, recorded_work, short
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from qvla_export.baselines.baseline import Baseline
    from qvla_export.baselines.environment import BaselineEnvironment
    from qvla_export.baselines.methods import BaselineRequest
    from qvla_export.policies.base import Policy


@dataclass(frozen=True)
class BaselineVerdict:
    """A library's quantization of a policy, and what became of its actions."""

    baseline: "Baseline"
    error: HeldOutError
    # None where no episodes were run.
    evaluation: "Evaluation | None"
    # Where all of it is, inside the run folder.
    folder: Path

    def to_json(self) -> dict[str, Any]:
        """Return the figures, as JSON values."""
        baseline, evaluation = self.baseline, self.evaluation
        success = None
        if evaluation is not None:
            low, high = evaluation.interval()
            success = {
                "episodes": len(evaluation.results),
                "success": evaluation.success(),
                "wilson_95": [low, high],
            }
        return {
            "setting": baseline.request.setting,
            "libraries": dict(baseline.libraries),
            "seconds": baseline.seconds,
            "weight_bytes": baseline.weight_bytes,
            "mean_bits_per_channel": baseline.mean_bits_per_channel,
            "stored_bits_per_weight": baseline.stored_bits_per_weight,
            "action_error": self.error.to_json(),
            "episodes": success,
            "folder": str(self.folder),
        }

    def lines(self) -> Iterator[str]:
        """Yield the figures for a terminal."""
        from calibration.benchmarks.evaluation_lines import success_text

        baseline, error = self.baseline, self.error
        median = ""
        if error.median_rms is not None:
            median = f", of the median observation {error.median_rms:.4f}"
        if error.expected_rms is not None:
            median += f", given the float policy's tokens {error.expected_rms:.4f}"
        libraries = ", ".join(f"{name} {version}" for name, version in baseline.libraries.items())
        yield (
            f"{baseline.request.setting}: held-out action error {error.rms:.4f} RMS on "
            f"{error.held_out} observations{median}; {baseline.mean_bits_per_channel:.2f} mean "
            f"bits per channel, {baseline.stored_bits_per_weight:.2f} stored, "
            f"{baseline.weight_bytes} bytes; {baseline.seconds:.1f} s of {libraries}"
        )
        if self.evaluation is not None:
            yield success_text(self.evaluation)
        yield f"baseline: {self.folder}"


def judge_baseline(
    run: RunFolder,
    request: "BaselineRequest",
    source: PolicySource,
    environment: "BaselineEnvironment",
    config: "RolloutConfig | None" = None,
    workers: int = 2,
    on_progress: OnProgress = ignore,
) -> BaselineVerdict:
    """Quantize with a library, or keep what it made, and measure what that does to the actions.

    Args:
        run: has a calibration set.
        request: the library's method and widths.
        source: the checkpoint.
        environment: where the libraries are.
        config: closed-loop episodes to run; None for none.
        workers: processes that run them.
        on_progress: hears of the library's work and of the episodes.

    Raises:
        QvlaError: the environment or its library is missing, or the library failed.
    """
    from qvla_export.baselines.results import baseline_paths

    policy = open_checkpoint(Path(source.place), source.unnorm_key, source.preset)
    baseline = quantize(run, request, policy, source, environment, on_progress)
    error = action_error(run, baseline, policy, on_progress)
    evaluation = None
    if config is not None:
        evaluation = rollouts(run, baseline, source, config, workers, on_progress)
    folder = baseline_paths(run.root, request.setting).folder
    return BaselineVerdict(baseline, error, evaluation, folder)


def request_for(
    target: Target, method: str, bits: int, activation_bits: int | None, seed: int, iterations: int
) -> "BaselineRequest":
    """Return a request whose scales are stored as the target stores those of its own weights.

    Raises:
        QvlaError: no such method, or it is not run at these widths.
    """
    from qvla_export.baselines.methods import BaselineRequest

    container = target.containers[4 if bits == 3 or bits not in target.containers else bits]
    return BaselineRequest(
        method,
        bits,
        activation_bits,
        container.group_size,
        container.scale_bits or 16,
        seed,
        iterations,
    )


def quantize(
    run: RunFolder,
    request: "BaselineRequest",
    policy: "Policy",
    source: PolicySource,
    environment: "BaselineEnvironment",
    on_progress: OnProgress = ignore,
) -> "Baseline":
    """Return the run's baseline of this request, made now if it is not there.

    Raises:
        QvlaError: the environment or its library is missing, or the library failed.
    """
    from qvla_export.baselines.baseline import Baseline
    from qvla_export.baselines.environment import BaselineJob
    from qvla_export.baselines.methods import METHODS
    from qvla_export.baselines.results import baseline_paths
    from qvla_export.pipeline.baseline_worker import work

    calibration = load_calibration(run)
    path = baseline_paths(run.root, request.setting).baseline
    earlier = load_if_current(
        path,
        Baseline.load,
        lambda old: (
            (old.request, old.policy_digest, old.calibration_digest)
            == (request, policy.digest, calibration.digest)
        ),
    )
    if earlier is not None:
        finish(on_progress, request.setting, kept=True)
        return earlier
    job = BaselineJob(
        request,
        str(Path(source.place).absolute()),
        str(run.calibration.absolute()),
        str(path.absolute()),
        source.unnorm_key,
        source.preset,
    )
    options: dict[str, Value] = {
        "--policy": short(policy.digest),
        "calibration set": short(calibration.digest),
        **{f"--{name.replace('_', '-')}": value for name, value in asdict(request).items()},
    }
    with recorded_work(ArtifactWork(run, path, options, (run.calibration,)), on_progress) as hear:
        tell = bar(hear, request.setting)
        apart = METHODS[request.method].installed_apart
        baseline = environment.run(job, tell) if apart else work(job, tell)
    finish(on_progress, request.setting, kept=False)
    return baseline


def load_baseline(run: RunFolder, setting: str) -> "Baseline":
    """Read a setting's baseline that was made before.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from qvla_export.baselines.baseline import Baseline
    from qvla_export.baselines.results import baseline_paths

    return Baseline.load(require_artifact(baseline_paths(run.root, setting).baseline, "baseline"))


def action_error(
    run: RunFolder, baseline: "Baseline", policy: "Policy", on_progress: OnProgress = ignore
) -> HeldOutError:
    """Compare a baseline with the float policy on the held-out observations, in torch.

    Raises:
        ArtifactMismatch: the baseline was made from another calibration set.
    """
    from engines.drift import action_drift
    from qvla_export.baselines.applied import baseline_applied
    from qvla_export.baselines.results import baseline_paths
    from qvla_export.graph.golden import golden_actions, token_divergence

    setting = baseline.request.setting
    path = baseline_paths(run.root, setting).action_error
    calibration = load_calibration(run)
    require_calibration(calibration, baseline.calibration_digest, "baseline")
    subject = ErrorSubject(setting, "baseline", baseline.digest, calibration.digest, "torch")
    earlier = load_error_if_current(path, subject)
    if earlier is not None:
        finish(on_progress, "action error", kept=True)
        return earlier
    made_of = baseline_paths(run.root, setting).baseline
    with recorded_work(error_work(run, path, subject, made_of), on_progress):
        reference = golden_actions(policy, None, calibration.held_out).full_precision
        with baseline_applied(policy, baseline):
            actions = golden_actions(policy, None, calibration.held_out).full_precision
        unit = policy.processor.statistics.action.scale()
        drift = action_drift(reference, actions, unit, policy.processor.spec.action_bins)
        applied = partial(baseline_applied, policy, baseline)
        divergence = token_divergence(policy, calibration.held_out, applied)
        error = held_out_error(subject, drift, reference[0].size, divergence)
        error.save(path)
    finish(on_progress, "action error", kept=False)
    return error


def rollouts(
    run: RunFolder,
    baseline: "Baseline",
    source: PolicySource,
    config: "RolloutConfig",
    workers: int,
    on_progress: OnProgress = ignore,
) -> "Evaluation":
    """Run a baseline closed loop beside the float policy, on the episodes of our own settings.

    Raises:
        QvlaError: a policy does not open or act, or a worker died.
    """
    from calibration.benchmarks.evaluation import load_evaluation
    from calibration.benchmarks.rollouts import RolloutJob, evaluate
    from qvla_export.baselines.applied import BaselineSource
    from qvla_export.baselines.results import baseline_paths

    paths = baseline_paths(run.root, baseline.request.setting)
    work = f"rollouts, {baseline.request.setting}"
    earlier = load_if_current(
        paths.evaluation,
        load_evaluation,
        lambda old: (old.digest, old.config) == (baseline.digest, config),
    )
    if earlier is not None:
        finish(on_progress, work, kept=True)
        return earlier
    single = replace(source, threads=1)
    job = RolloutJob(
        baseline.request.setting,
        baseline.digest,
        BaselineSource(single, paths.baseline),
        config,
        reference=single,
        reference_digest=baseline.policy_digest,
    )
    record = rollout_work(run, paths.evaluation, job, paths.baseline)
    with recorded_work(record, on_progress) as hear:
        evaluation = evaluate(job, paths.evaluation, workers, bar(hear, work))
    finish(on_progress, work, kept=False)
    return evaluation
