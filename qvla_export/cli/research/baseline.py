"""`qvla baseline`: another library's quantization of the same policy, judged like our own."""

from pathlib import Path
from typing import Annotated

import typer

from qvla_export.cli.options import (
    EnvironmentOption,
    ForceOption,
    JsonOption,
    PolicyOption,
    PresetOption,
    RunOption,
    SeedOption,
    TargetOption,
    TasksOption,
    UnnormKeyOption,
    WorkersOption,
)
from qvla_export.cli.progress import print_result, progress_shown

_METHOD = (
    "max, smoothquant or awq (modelopt), gptq or hadamard-gptq (llm-compressor), auto-round; "
    "without a library fisher (as ActQuant) and sign (1 bit, simulated)."
)
_INPUTS = "Of layers' inputs: 8 or 4 for max, 8 for smoothquant; left out: float."


def baseline(
    method: Annotated[str, typer.Argument(help=_METHOD)],
    run: RunOption,
    policy: PolicyOption,
    bits: Annotated[int, typer.Option(help="Of weights: 2, 3, 4 or 8; 1 for sign.")] = 4,
    activation_bits: Annotated[int | None, typer.Option(help=_INPUTS)] = None,
    environment: EnvironmentOption = Path(".baselines"),
    target: TargetOption = "cpu",
    iterations: Annotated[int, typer.Option(help="Steps of auto-round, each block.")] = 200,
    tasks: TasksOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes of each task; 0 for none.")] = 0,
    seed: SeedOption = 0,
    workers: WorkersOption = 2,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize with a kept library; action error, bytes and success by our own code.

    Groups and bits of scales are the target's: those of its 4-bit weights for 3 bits.
    """
    from calibration.benchmarks.evaluation import RolloutConfig
    from engines.targets import find_target
    from qvla_export.baselines.environment import BaselineEnvironment
    from qvla_export.pipeline.baseline import judge_baseline, request_for
    from qvla_export.pipeline.calibrate import chosen_tasks
    from qvla_export.pipeline.policy_source import PolicySource
    from qvla_export.pipeline.run_folder import RunFolder

    request = request_for(find_target(target), method, bits, activation_bits, seed, iterations)
    source = PolicySource(str(policy), unnorm_key, preset)
    config = RolloutConfig(chosen_tasks(tasks), episodes) if episodes else None
    with progress_shown() as on_progress:
        verdict = judge_baseline(
            RunFolder(run, force),
            request,
            source,
            BaselineEnvironment(environment),
            config,
            workers,
            on_progress,
        )
    print_result(verdict, verdict.lines(), as_json)
