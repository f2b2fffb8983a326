"""One contestant in one seed's run folder: made, judged, and what it took."""

from dataclasses import replace
from typing import TYPE_CHECKING

from qvla_export.allocation.setting import Setting
from qvla_export.comparison.contestants import Contestant
from qvla_export.comparison.rows import Cost, EngineName, Outcome, SeedRow
from qvla_export.pipeline import baseline as libraries
from qvla_export.pipeline import evaluate, fake_quantized
from qvla_export.pipeline.action_error import HeldOutError
from qvla_export.pipeline.activations import activations
from qvla_export.pipeline.compare.seed_folder import SeedFolder, measure_sensitivities
from qvla_export.pipeline.export import export
from qvla_export.pipeline.plan import load_plan, plan
from qvla_export.pipeline.progress import OnProgress, ignore
from qvla_export.pipeline.round import round_setting
from qvla_export.quantizer.plan import BitPlan

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from qvla_export.policies.base import Policy

_FLOAT16 = 16.0
# Steps of a library's learned method, each block.
_ITERATIONS = 200


def measure_contestant(
    folder: SeedFolder,
    contestant: Contestant,
    exported: bool,
    on_progress: OnProgress = ignore,
) -> SeedRow:
    """Make a contestant, or keep it, and measure its held-out action error.

    Args:
        folder: see `qvla_export.pipeline.compare.seed_folder.folder_for`.
        contestant: what to make.
        exported: judge its bundle on an engine; else its plan in torch.
        on_progress: hears of every stage.

    Raises:
        QvlaError: a stage fails, or a library is missing.
    """
    if contestant.kind == "library":
        return _measure_library(folder, contestant, on_progress)
    setting, engine = contestant.of_run, _engine(contestant, exported)
    names = _plan_setting(folder, setting, on_progress)
    if engine == "torch":
        error = fake_quantized.action_error(folder.run, setting, folder.policy, on_progress)
    else:
        name = f"{setting.name}: export"
        folder.time_stage(
            name,
            folder.run.bundle(setting),
            lambda: export(
                folder.run, setting, folder.policy, folder.target, on_progress=on_progress
            ),
        )
        names.append(name)
        error = evaluate.action_error(folder.run, setting, folder.policy, on_progress)
    return _row(folder, engine, _cost(folder, setting, engine), error, names)


def with_episodes(
    folder: SeedFolder,
    contestant: Contestant,
    row: SeedRow,
    config: "RolloutConfig",
    workers: int,
    on_progress: OnProgress = ignore,
) -> SeedRow:
    """Run a contestant closed loop, or keep what was run, and add it to its row.

    Raises:
        QvlaError: a policy does not open or act, or a worker died.
    """
    run, source = folder.run, folder.source
    if contestant.kind == "library":
        baseline = libraries.load_baseline(run, contestant.setting)
        evaluation = libraries.rollouts(run, baseline, source, config, workers, on_progress)
    else:
        judge = fake_quantized.rollouts if row.engine == "torch" else evaluate.rollouts
        evaluation = judge(run, contestant.of_run, config, source, workers, on_progress)
    cumulative = tuple(evaluation.cumulative_deviation())
    return replace(row, episodes=outcomes(evaluation), cumulative=cumulative)


def outcomes(evaluation: "Evaluation") -> tuple[Outcome, ...]:
    """Return an evaluation's episodes as a comparison has them."""
    from calibration.benchmarks.metaworld.tasks import find_task

    return tuple(
        Outcome(
            r.task,
            r.seed,
            r.success,
            sum(r.deviations) if r.deviations else None,
            find_task(r.task).scene,
            None if r.motion is None else r.motion.jerk_rms,
            None if r.motion is None else r.motion.gripper_flips,
        )
        for r in evaluation.results
    )


def _engine(contestant: Contestant, exported: bool) -> EngineName:
    simulated = contestant.simulated or not exported
    return "torch" if simulated and contestant.of_run.kind != "float" else "onnxruntime"


def _plan_setting(folder: SeedFolder, setting: Setting, on_progress: OnProgress) -> list[str]:
    """Make a setting's plan and what it needs; return the names of the stages it took."""
    if setting.kind == "float":
        return []
    run, policy = folder.run, folder.policy
    measure_sensitivities(folder, on_progress)
    names = [*folder.seconds_before, *(["moments"] if folder.compensated else [])]
    names += ["sensitivities"] if setting.kind == "planned" else []
    if setting.activation_bits is not None:
        folder.time_stage(
            "activations",
            run.activations,
            lambda: activations(run, policy, on_progress=on_progress),
        )
        names.append("activations")
    name = f"{setting.name}: plan"
    folder.time_stage(
        name,
        run.plan(setting),
        lambda: plan(run, setting, folder.target, policy.digest, on_progress=on_progress),
        always=True,
    )
    names.append(name)
    if folder.compensated:
        name = f"{setting.name}: rounding"
        folder.time_stage(
            name,
            run.rounding(setting),
            lambda: round_setting(run, setting, policy, on_progress=on_progress),
        )
        names.append(name)
    return names


def _row(
    folder: SeedFolder, engine: EngineName, cost: Cost, error: HeldOutError, names: list[str]
) -> SeedRow:
    recorded = {**folder.seconds_before, **folder.seconds()}
    known = {name.partition(": ")[2] or name: recorded[name] for name in names if name in recorded}
    complete = len(known) == len(names)
    return SeedRow(
        folder.seed,
        error.subject.digest,
        engine,
        cost,
        error.held_out,
        error.rms,
        error.mean_abs_normalized,
        error.mean_abs_physical,
        # A sum without one of its parts would mislead.
        seconds={name: wall for name, (wall, _) in known.items()} if complete else {},
        cpu_seconds={name: cpu for name, (_, cpu) in known.items()} if complete else {},
    )


def _cost(folder: SeedFolder, setting: Setting, engine: EngineName) -> Cost:
    planned = load_plan(folder.run, setting)
    if planned is None:
        float16_bytes = _float16_bytes(folder.policy)
        return Cost(float16_bytes, float16_bytes, _FLOAT16, _FLOAT16, _FLOAT16)
    return _plan_cost(planned, None if engine == "torch" else _layer_bytes(folder, setting))


def _plan_cost(planned: BitPlan, exported_bytes: int | None) -> Cost:
    """Return what a plan takes; of an exported one, what its bundle really stores."""
    nbytes = planned.weight_bytes if exported_bytes is None else exported_bytes
    return Cost(
        nbytes,
        planned.float16_bytes,
        planned.mean_bits_per_channel,
        planned.mean_bits_per_weight,
        16 * nbytes / planned.float16_bytes,
    )


def _layer_bytes(folder: SeedFolder, setting: Setting) -> int:
    sizes = evaluate.load_bundle(folder.run, setting).weight_bytes
    return sum(nbytes for part, nbytes in sizes.items() if part != "rest")


def _float16_bytes(policy: "Policy") -> int:
    from qvla_export.policies.layers import layer_shapes, traced_layers

    shapes = layer_shapes(traced_layers(policy))
    return 2 * sum(channels * inputs for channels, inputs in shapes.values())


def _measure_library(
    folder: SeedFolder, contestant: Contestant, on_progress: OnProgress
) -> SeedRow:
    from qvla_export.baselines.environment import BaselineEnvironment

    method, bits, inputs = contestant.request
    request = libraries.request_for(folder.target, method, bits, inputs, folder.seed, _ITERATIONS)
    environment = BaselineEnvironment(folder.environment)
    baseline = libraries.quantize(
        folder.run, request, folder.policy, folder.source, environment, on_progress
    )
    error = libraries.action_error(folder.run, baseline, folder.policy, on_progress)
    layers = baseline.layers.values()
    sizes = [layer.weight.codes.size for layer in layers]
    widths = [layer.weight.bits for layer in layers]
    cost = Cost(
        baseline.weight_bytes,
        baseline.float16_bytes,
        baseline.mean_bits_per_channel,
        sum(size * bits for size, bits in zip(sizes, widths, strict=True)) / sum(sizes),
        baseline.stored_bits_per_weight,
    )
    row = _row(folder, "torch", cost, error, [])
    library = ", ".join(f"{name} {version}" for name, version in baseline.libraries.items())
    return replace(row, seconds={"library": baseline.seconds}, library=library)
