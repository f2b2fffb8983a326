"""`qvla baseline`: another library's quantization of the same policy, judged like our own."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qvla_export.cli.options import (
    EnvironmentOption,
    PolicyOption,
    PresetOption,
    RunOption,
    SeedOption,
    TargetOption,
    UnnormKeyOption,
    WorkersOption,
)

if TYPE_CHECKING:
    from qvla_export.baselines.baseline import Baseline

_METHOD = "max, smoothquant or awq (modelopt), gptq (llm-compressor), auto-round."
_INPUTS = "Of layers' inputs: 8 or 4 for max, 8 for smoothquant; left out: float."


def baseline(
    method: Annotated[str, typer.Argument(help=_METHOD)],
    run: RunOption,
    policy: PolicyOption,
    bits: Annotated[int, typer.Option(help="Of weights: 2, 3, 4 or 8.")] = 4,
    activation_bits: Annotated[int | None, typer.Option(help=_INPUTS)] = None,
    environment: EnvironmentOption = Path(".baselines"),
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
    from qvla_export.pipeline.baseline import action_error, quantize, request_for, rollouts
    from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint
    from qvla_export.pipeline.run_folder import RunFolder

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


def _figures(quantized: "Baseline", error: dict[str, Any]) -> str:
    libraries = ", ".join(f"{name} {version}" for name, version in quantized.libraries.items())
    return (
        f"{quantized.request.setting}: held-out action error {error['rms']:.4f} RMS on "
        f"{error['held_out']} observations; {quantized.mean_bits_per_channel:.2f} mean bits per "
        f"channel, {quantized.stored_bits_per_weight:.2f} stored, {quantized.weight_bytes} bytes; "
        f"{quantized.seconds:.1f} s of {libraries}"
    )
