"""The steps of another library's quantization, judged like our own."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.run_folder import RunFolder, made
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from qvla_export.baselines.baseline import Baseline
    from qvla_export.baselines.environment import BaselineEnvironment
    from qvla_export.baselines.methods import BaselineRequest
    from qvla_export.policies.base import Policy


def request_for(
    target: Target, method: str, bits: int, activation_bits: int | None, seed: int, iterations: int
) -> "BaselineRequest":
    """Return a request whose scales are stored as the target stores those of its own weights."""
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
    wanted: "BaselineRequest",
    policy: "Policy",
    source: PolicySource,
    environment: "BaselineEnvironment",
) -> "Baseline":
    """Return the run's baseline of this request, made now if it is not there.

    Raises:
        QvlaError: the environment or its library is missing, or the library failed.
    """
    from calibration.calibration_set import CalibrationSet
    from qvla_export.baselines.baseline import Baseline
    from qvla_export.baselines.environment import BaselineJob
    from qvla_export.baselines.results import baseline_paths
    from qvla_export.pipeline.plan import kept_artifact

    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    path = baseline_paths(run.root, wanted.setting).baseline
    kept = kept_artifact(path, Baseline.load)
    if kept is not None and (
        (kept.request, kept.policy_digest, kept.calibration_digest)
        == (wanted, policy.digest, calibration.digest)
    ):
        return kept
    job = BaselineJob(
        wanted,
        str(Path(source.place).absolute()),
        str(run.calibration.absolute()),
        str(path.absolute()),
        source.unnorm_key,
        source.preset,
    )
    return environment.run(job)


def kept_baseline(run: RunFolder, setting: str) -> "Baseline":
    """Read a setting's baseline that was made before.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    from qvla_export.baselines.baseline import Baseline
    from qvla_export.baselines.results import baseline_paths

    return Baseline.load(made(baseline_paths(run.root, setting).baseline, "baseline"))


def action_error(run: RunFolder, quantized: "Baseline", policy: "Policy") -> dict[str, Any]:
    """Compare a baseline with the float policy on the held-out observations, in torch."""
    from calibration.calibration_set import CalibrationSet
    from engines.drift import action_drift
    from qvla_export.baselines.applied import baseline_applied
    from qvla_export.baselines.results import baseline_paths
    from qvla_export.graph.golden import golden_actions
    from qvla_export.pipeline.fake_quantized import error_figures
    from qvla_export.pipeline.plan import kept_artifact, require_calibration
    from qvla_export.shared.artifacts import read_json, write_json

    path = baseline_paths(run.root, quantized.request.setting).action_error
    calibration = CalibrationSet.load(made(run.calibration, "calibrate"))
    require_calibration(calibration, quantized.calibration_digest, "baseline")
    identity = {
        "setting": quantized.request.setting,
        "baseline_digest": quantized.digest,
        "calibration_digest": calibration.digest,
        "runtime": "torch",
    }
    kept = kept_artifact(path, lambda p: read_json(p, "action error"))
    if kept is not None and all(kept.get(name) == value for name, value in identity.items()):
        return dict(kept)
    reference = golden_actions(policy, None, calibration.held_out).full_precision
    with baseline_applied(policy, quantized):
        actions = golden_actions(policy, None, calibration.held_out).full_precision
    unit = policy.processor.statistics.action.scale()
    error = action_drift(reference, actions, unit, policy.processor.spec.action_bins)
    value = {
        **identity,
        **error_figures(error, reference[0].size),
    }
    write_json(path, value)
    return value


def rollouts(
    run: RunFolder,
    quantized: "Baseline",
    source: PolicySource,
    config: "RolloutConfig",
    workers: int,
) -> "Evaluation":
    """Run a baseline closed loop beside the float policy, on the episodes of our own settings."""
    from calibration.benchmarks.evaluation import load_evaluation
    from calibration.benchmarks.rollouts import evaluate
    from qvla_export.baselines.applied import BaselineSource
    from qvla_export.baselines.results import baseline_paths
    from qvla_export.pipeline.plan import kept_artifact

    paths = baseline_paths(run.root, quantized.request.setting)
    kept = kept_artifact(paths.evaluation, load_evaluation)
    if kept is not None and (kept.digest, kept.config) == (quantized.digest, config):
        return kept
    single = replace(source, threads=1)
    return evaluate(
        quantized.request.setting,
        quantized.digest,
        BaselineSource(single, paths.baseline),
        config,
        paths.evaluation,
        reference=single,
        workers=workers,
        reference_digest=quantized.policy_digest,
    )
