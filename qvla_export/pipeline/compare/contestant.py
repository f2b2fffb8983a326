"""One contestant in one seed's run folder: made, judged, and what it took."""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qvla_export.allocation.setting import Setting
from qvla_export.comparison.contestants import Contestant
from qvla_export.comparison.rows import Cost, EngineName, Outcome, SeedRow
from qvla_export.pipeline import evaluate as judging
from qvla_export.pipeline import export as exporting
from qvla_export.pipeline import fake_quantized as simulated
from qvla_export.pipeline import moments as compensating
from qvla_export.pipeline import plan as stages
from qvla_export.pipeline.compare.seed_folder import Stand, sensitivities
from qvla_export.quantizer.plan import BitPlan

if TYPE_CHECKING:
    from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
    from qvla_export.policies.base import Policy

_FLOAT16 = 16.0


def measure(stand: Stand, contestant: Contestant, exported: bool) -> SeedRow:
    """Make a contestant, or keep it, and measure its held-out action error.

    Args:
        stand: see `qvla_export.pipeline.compare.seed_folder.stand_of`.
        contestant: what to make.
        exported: judge its bundle on an engine; else its plan in torch.

    Raises:
        QvlaError: a stage fails, or a library is missing.
    """
    if contestant.kind == "library":
        return _measure_library(stand, contestant)
    setting, engine = contestant.of_run, _engine(contestant, exported)
    names = _plan(stand, setting)
    if engine == "torch":
        error = simulated.action_error(stand.run, setting, stand.policy)
        digest = str(error["plan_digest"])
    else:
        export = f"{setting.name}: export"
        stand.timed(
            export,
            stand.run.bundle(setting),
            lambda: exporting.export(stand.run, setting, stand.policy, stand.target),
        )
        names.append(export)
        error = judging.action_error(stand.run, setting, stand.policy)
        digest = str(error["bundle_digest"])
    return _row(stand, digest, engine, _cost(stand, setting, engine), error, names)


def with_episodes(
    stand: Stand,
    contestant: Contestant,
    row: SeedRow,
    config: "RolloutConfig",
    workers: int,
) -> SeedRow:
    """Run a contestant closed loop, or keep what was run, and add it to its row."""
    from qvla_export.pipeline import baseline as baselining

    if contestant.kind == "library":
        quantized = baselining.kept_baseline(stand.run, contestant.setting)
        done = baselining.rollouts(stand.run, quantized, stand.source, config, workers)
    elif row.engine == "torch":
        setting = contestant.of_run
        done = simulated.rollouts(stand.run, setting, config, stand.source, workers)
    else:
        done = judging.rollouts(stand.run, contestant.of_run, config, stand.source, workers)
    cumulative = tuple(done.cumulative_deviation())
    return replace(row, episodes=outcomes(done), cumulative=cumulative)


def outcomes(done: "Evaluation") -> tuple[Outcome, ...]:
    """Return an evaluation's episodes as a comparison has them."""
    return tuple(
        Outcome(r.task, r.seed, r.success, sum(r.deviations) if r.deviations else None)
        for r in done.results
    )


def _engine(contestant: Contestant, exported: bool) -> EngineName:
    simulated_ = contestant.simulated or not exported
    return "torch" if simulated_ and contestant.of_run.kind != "float" else "onnxruntime"


def _plan(stand: Stand, setting: Setting) -> list[str]:
    """Make a setting's plan and what it needs; return the names of the stages it took."""
    if setting.kind == "float":
        return []
    sensitivities(stand)
    names = [*stand.earlier, *(["moments"] if stand.compensated else [])]
    names += ["sensitivities"] if setting.kind == "planned" else []
    if setting.activation_bits is not None:
        stand.timed(
            "activations",
            stand.run.activations,
            lambda: stages.activations(stand.run, stand.policy),
        )
        names.append("activations")
    plan = f"{setting.name}: plan"
    stand.timed(
        plan,
        stand.run.plan(setting),
        lambda: stages.plan(stand.run, setting, stand.target, stand.policy.digest),
        always=True,
    )
    names.append(plan)
    if stand.compensated:
        rounding = f"{setting.name}: rounding"
        stand.timed(
            rounding,
            stand.run.rounding(setting),
            lambda: compensating.rounded(stand.run, setting, stand.policy),
        )
        names.append(rounding)
    return names


def _row(
    stand: Stand,
    digest: str,
    engine: EngineName,
    cost: Cost,
    error: Mapping[str, Any],
    names: list[str],
) -> SeedRow:
    told = {**stand.earlier, **stand.seconds()}
    known = {name.partition(": ")[2] or name: told[name] for name in names if name in told}
    complete = len(known) == len(names)
    return SeedRow(
        stand.seed,
        digest,
        engine,
        cost,
        int(error["held_out"]),
        float(error["rms"]),
        tuple(error["mean_abs_normalized"]),
        tuple(error["mean_abs_physical"]),
        # A sum without one of its parts would mislead.
        seconds={name: wall for name, (wall, _) in known.items()} if complete else {},
        cpu_seconds={name: cpu for name, (_, cpu) in known.items()} if complete else {},
    )


def _cost(stand: Stand, setting: Setting, engine: EngineName) -> Cost:
    plan = stages.load_plan(stand.run, setting)
    if plan is None:
        float16_bytes = _float16_bytes(stand.policy)
        return Cost(float16_bytes, float16_bytes, _FLOAT16, _FLOAT16, _FLOAT16)
    return _plan_cost(plan, None if engine == "torch" else _layer_bytes(stand, setting))


def _plan_cost(plan: BitPlan, exported_bytes: int | None) -> Cost:
    """What a plan takes; of an exported one, what its bundle really stores."""
    nbytes = plan.weight_bytes if exported_bytes is None else exported_bytes
    return Cost(
        nbytes,
        plan.float16_bytes,
        plan.mean_bits_per_channel,
        plan.mean_bits_per_weight,
        16 * nbytes / plan.float16_bytes,
    )


def _layer_bytes(stand: Stand, setting: Setting) -> int:
    sizes = judging.load_bundle(stand.run, setting).weight_bytes
    return sum(nbytes for part, nbytes in sizes.items() if part != "rest")


def _float16_bytes(policy: "Policy") -> int:
    from qvla_export.policies.layers import layer_shapes, traced_layers

    shapes = layer_shapes(traced_layers(policy))
    return 2 * sum(channels * inputs for channels, inputs in shapes.values())


def _measure_library(stand: Stand, contestant: Contestant) -> SeedRow:
    from qvla_export.baselines.environment import BaselineEnvironment
    from qvla_export.pipeline import baseline as baselining

    method, bits, inputs = contestant.request
    wanted = baselining.request_for(stand.target, method, bits, inputs, stand.seed, 200)
    environment = BaselineEnvironment(stand.environment)
    quantized = baselining.quantize(stand.run, wanted, stand.policy, stand.source, environment)
    error = baselining.action_error(stand.run, quantized, stand.policy)
    layers = quantized.layers.values()
    sizes = [layer.weight.codes.size for layer in layers]
    widths = [layer.weight.bits for layer in layers]
    cost = Cost(
        quantized.weight_bytes,
        quantized.float16_bytes,
        quantized.mean_bits_per_channel,
        sum(size * bits for size, bits in zip(sizes, widths, strict=True)) / sum(sizes),
        quantized.stored_bits_per_weight,
    )
    row = _row(stand, quantized.digest, "torch", cost, error, [])
    library = ", ".join(f"{name} {version}" for name, version in quantized.libraries.items())
    return replace(row, seconds={"library": quantized.seconds}, library=library)
