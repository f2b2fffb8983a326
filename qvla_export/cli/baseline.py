"""`qvla baseline`: another library's quantization of the same policy, judged like our own."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvla_export.cli.options import (
    PolicyOption,
    PresetOption,
    RunOption,
    SeedOption,
    TargetOption,
    UnnormKeyOption,
    WorkersOption,
    open_checkpoint,
)
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.run_folder import RunFolder, made
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from qvla_export.baselines.baseline import Baseline
    from qvla_export.baselines.environment import BaselineEnvironment
    from qvla_export.baselines.methods import BaselineRequest
    from qvla_export.policies.base import Policy

_METHOD = "max, smoothquant or awq (modelopt), gptq (llm-compressor), auto-round."
_INPUTS = "Of layers' inputs: 8 or 4 for max, 8 for smoothquant; left out: float."


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(baseline)


def baseline(
    method: Annotated[str, typer.Argument(help=_METHOD)],
    run: RunOption,
    policy: PolicyOption,
    bits: Annotated[int, typer.Option(help="Of weights: 2, 3, 4 or 8.")] = 4,
    activation_bits: Annotated[int | None, typer.Option(help=_INPUTS)] = None,
    environment: Annotated[
        Path, typer.Option(help="Environment of the libraries: make baselines-env.")
    ] = Path(".baselines"),
    target: TargetOption = "cpu",
    iterations: Annotated[int, typer.Option(help="Steps of auto-round, each block.")] = 200,
    episodes: Annotated[int, typer.Option(help="Episodes of each task; 0 for none.")] = 0,
    seed: SeedOption = 0,
    workers: WorkersOption = 2,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
) -> None:
    """Quantize with a kept library; action error, bytes and success by our own code.

    Groups and bits of scales are the target's: those of its 4-bit weights for 3 bits.
    """
    from engines.targets import find_target
    from qvla_export.baselines.environment import BaselineEnvironment
    from qvla_export.baselines.results import baseline_paths

    folder, source = RunFolder(run), PolicySource(str(policy), unnorm_key, preset)
    wanted = request_for(find_target(target), method, bits, activation_bits, seed, iterations)
    opened = open_checkpoint(policy, unnorm_key, preset)
    quantized = quantize(folder, wanted, opened, source, BaselineEnvironment(environment))
    error = action_error(folder, quantized, opened)
    typer.echo(_figures(quantized, error))
    if episodes:
        from calibration.benchmarks.evaluation import RolloutConfig
        from calibration.benchmarks.metaworld.tasks import TASKS

        config = RolloutConfig(tuple(TASKS), episodes)
        result = rollouts(folder, quantized, source, config, workers)
        low, high = result.interval()
        typer.echo(
            f"success {result.success():.1%} [{low:.1%}, {high:.1%}] of {len(result.results)} "
            "episodes"
        )
    typer.echo(f"baseline: {baseline_paths(folder.root, wanted.setting).folder}")


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


def _figures(quantized: "Baseline", error: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in quantized.libraries.items())
    return (
        f"{quantized.request.setting}: held-out action error {error['rms']:.4f} RMS on "
        f"{error['held_out']} observations; {quantized.mean_bits_per_channel:.2f} mean bits per "
        f"channel, {quantized.stored_bits_per_weight:.2f} stored, {quantized.weight_bytes} bytes; "
        f"{quantized.seconds:.1f} s of {libraries}"
    )
