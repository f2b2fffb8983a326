"""`qvla evaluate`: a policy in closed loop."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from qvla_export.cli.options import (
    A_CHECKPOINT,
    A_POLICY,
    AN_EVALUATION,
    JsonOption,
    PresetOption,
    TasksOption,
    UnnormKeyOption,
    WorkersOption,
)
from qvla_export.cli.progress import print_texts, progress_shown


def evaluate(
    policy: Annotated[
        str,
        typer.Argument(
            help="Checkpoint, bundle, URL of a server, or baseline (with --checkpoint).",
            callback=A_POLICY.require,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Evaluation JSON to write.")],
    tasks: TasksOption = None,
    episodes: Annotated[int, typer.Option(help="Episodes of each task.")] = 20,
    seed: Annotated[int, typer.Option(help="First episode seed; equal seeds are paired.")] = (
        1_000_000
    ),
    execute: Annotated[int, typer.Option(help="Actions executed before looking again.")] = 8,
    delay_steps: Annotated[
        int, typer.Option(min=0, help="Control steps that pass while the policy thinks.")
    ] = 0,
    live: Annotated[
        bool, typer.Option("--live", help="As many steps pass as the policy really thinks.")
    ] = False,
    roll_forward: Annotated[
        bool,
        typer.Option("--roll-forward", help="Show the state at which the chunk will begin."),
    ] = False,
    seam_limit_mm: Annotated[
        float, typer.Option(min=0.0, help="Largest jump of a command between chunks; 0 for any.")
    ] = 0.0,
    shift: Annotated[
        str,
        typer.Option(
            help="NAME:GRADE of 1 to 3: start, placement, instruction, noise, distractors, camera, "
            "light, colour, or mixed, each episode another."
        ),
    ] = "none",
    control: Annotated[str, typer.Option(help="none, blank-image or wrong-instruction.")] = "none",
    gripper: Annotated[
        Literal["as-is", "robosuite"] | None,
        typer.Option(help="LIBERO: robosuite turns a policy's 0 closed and 1 open round."),
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(
            help="Policy to compare every decision with; gives cumulative deviation.",
            callback=A_POLICY.require,
        ),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            help="What a baseline quantizes.",
            callback=replace(A_CHECKPOINT, remedy="check --checkpoint").require,
        ),
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option(
            help="Another policy's evaluation of the same episodes, or of more or fewer of them; "
            "the paired differences of success and motion are printed.",
            callback=AN_EVALUATION.require,
        ),
    ] = None,
    workers: WorkersOption = 2,
    unnorm_key: UnnormKeyOption = None,
    preset: PresetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run closed-loop episodes in the simulator; success with its Wilson 95 % interval."""
    from calibration.benchmarks.evaluation import RolloutConfig, load_evaluation, parse_control
    from calibration.benchmarks.evaluation_lines import evaluation_lines
    from qvla_export.pipeline.evaluate import evaluate_policy, evaluated_tasks
    from qvla_export.pipeline.paired_evaluations import pair_evaluations
    from qvla_export.pipeline.policy_source import PolicySource

    config = RolloutConfig(
        tasks=evaluated_tasks(tasks),
        episodes=episodes,
        seed=seed,
        execute=execute,
        control=parse_control(control),
        delay_steps=delay_steps,
        live=live,
        roll_forward=roll_forward,
        seam_limit_mm=seam_limit_mm,
        shift=shift,
        gripper=gripper,
    )
    quantized = None if checkpoint is None else str(checkpoint)
    source = PolicySource(policy, unnorm_key, preset, threads=1, checkpoint=quantized)
    other = None if reference is None else PolicySource(reference, unnorm_key, preset, threads=1)
    earlier = None if against is None else load_evaluation(against)
    with progress_shown() as on_progress:
        evaluation = evaluate_policy(source, config, output, other, workers, on_progress)
    pair = None if earlier is None else pair_evaluations(evaluation, earlier)
    if as_json:
        beside = {} if pair is None else {"against": asdict(pair)}
        typer.echo(json.dumps({**json.loads(output.read_text()), **beside}))
        return
    print_texts(evaluation_lines(evaluation, output))
    if pair is not None:
        typer.echo(f"against {against}: {pair}")
