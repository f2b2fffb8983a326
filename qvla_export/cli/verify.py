"""The command that judges an engine: verify, against torch or any other engine."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from qvla_export.cli.options import PresetOption, ThreadsOption, WeightsOption
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.shared.artifacts import require_same, versions, write_json
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from engines.base import Engine
    from engines.drift import ActionDrift
    from engines.verify import Reference, Verdict
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.bundle import Bundle
    from qvla_export.shared.observation import Observation

_FORMAT = "qvla.verification/1"
_GOLDEN = "golden"
RuntimeName = Literal["auto", "ort"]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(verify)


@dataclass(frozen=True)
class _Comparison:
    """What `verify` was asked to compare an engine with."""

    # "golden", or a bundle or checkpoint folder.
    against: str
    # "golden", or the folder of a calibration set, whose held-out part is meant.
    observations: str
    preset: str | None
    # Of the other bundle, as of the float one.
    runtime: RuntimeName
    threads: int | None


def verify(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder.")],
    against: Annotated[
        str, typer.Option(help="golden (torch's stored actions), a bundle, or a checkpoint.")
    ] = _GOLDEN,
    observations: Annotated[
        str, typer.Option(help="golden, or a calibration folder: its held-out observations.")
    ] = _GOLDEN,
    float_bundle: Annotated[
        Path | None,
        typer.Option("--float", help="Float bundle of the same policy; its drift is the floor."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Refuse a bundle for another; build its engines if absent.")
    ] = None,
    runtime: Annotated[
        RuntimeName, typer.Option(help="auto: the target's own; ort: ONNX Runtime on the CPU.")
    ] = "auto",
    against_runtime: Annotated[
        RuntimeName, typer.Option(help="Runtime of the bundle of --against: ort or auto.")
    ] = "ort",
    latency: Annotated[bool, typer.Option("--latency", help="Also profile a good engine.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Actions of the latency profile.")] = 200,
    output: Annotated[
        Path | None, typer.Option("--output", help="Report JSON, also of a refused engine.")
    ] = None,
    preset: PresetOption = None,
    threads: ThreadsOption = None,
    weights: WeightsOption = "packed",
) -> None:
    """Compare an engine's actions with torch's or another engine's; exit 2 if they differ."""
    from engines.verify import float_drift, judge
    from qvla_export.shared.bundle import Bundle

    loaded = Bundle.load(bundle)
    if target is not None:
        require_target(loaded, target)
        if runtime == "auto":
            build_absent_engines(loaded)
    wanted = _Comparison(against, observations, preset, against_runtime, threads)
    with ExitStack() as stack:
        start = time.perf_counter()
        engine = stack.enter_context(open_engine(loaded, runtime, threads, weights))
        load_ms = (time.perf_counter() - start) * 1e3
        held_out = _held_out(observations)
        reference = _reference(loaded, wanted, held_out)
        floor = None
        if float_bundle is not None:
            plain = _same_policy(float_bundle, loaded)
            floor_engine = stack.enter_context(open_engine(plain, runtime, threads, weights))
            floor = float_drift(plain, floor_engine, reference)
        verdict = judge(loaded, engine, reference, floor)
        report = {"format": _FORMAT, **verdict.to_json(), "versions": versions()}
        if latency and verdict.passed:
            conditions = f"{threads or 'all'} threads, {weights}"
            report["latency"] = _profile(loaded, engine, held_out, samples, load_ms, conditions)
    if output is not None:
        write_json(output, report)
    _say(verdict, report)
    verdict.require_passed()


def _same_policy(float_bundle: Path, bundle: "Bundle") -> "Bundle":
    from qvla_export.shared.bundle import Bundle

    plain, remedy = Bundle.load(float_bundle), "Give the float bundle of the same policy."
    digests = (bundle.policy_digest, plain.policy_digest)
    require_same("bundle and float bundle", *digests, remedy)
    return plain


def require_target(bundle: "Bundle", target: str) -> None:
    """Refuse a bundle that was made for another target.

    Raises:
        UnknownTarget, ArtifactMismatch: the target is not in the table, or not the bundle's.
    """
    from engines.targets import find_target

    name = find_target(target).name
    remedy = f"Plan and export for it: qvla plan --target {name}, qvla export --target {name}."
    require_same("bundle and target", bundle.target, name, remedy)


def open_engine(
    bundle: "Bundle",
    runtime: RuntimeName,
    threads: int | None,
    weights: Literal["packed", "unpacked"] = "packed",
) -> "Engine":
    """Load a bundle's engine: of its target, or of ONNX Runtime on this CPU."""
    from engines.load import load_engine

    return load_engine(bundle, threads, weights, runtime=None if runtime == "auto" else runtime)


def build_absent_engines(bundle: "Bundle") -> None:
    """Build the engines of a TensorRT bundle; up to date ones are kept.

    Raises:
        EngineError: this machine cannot run them, or they cannot be built.
    """
    from engines.base import EngineError
    from engines.targets import find_target
    from engines.trt.gpu import find_gpu
    from engines.trt.modules import is_tensorrt
    from engines.trt.sidecar import engine_folder
    from qvla_export.cli.build import build_with_progress

    target = find_target(bundle.target)
    if not is_tensorrt(target):
        return
    gpu = find_gpu()
    if gpu is None or gpu.compute_capability != target.compute_capability:
        found = "none" if gpu is None else f"{gpu.name} ({gpu.compute_capability})"
        raise EngineError(
            f"engines for target {target.name!r} run on an NVIDIA GPU of compute capability "
            f"{target.compute_capability} with its driver, found here: {found}. Run this command "
            "there; here, --runtime ort checks the bundle's graphs on the CPU"
        )
    build_with_progress(bundle, engine_folder(bundle))


def held_out_reference(
    bundle: "Bundle",
    policy: "Policy",
    plan: "BitPlan | None",
    observations: "Sequence[Observation]",
) -> "Reference":
    """Return torch's actions on held-out observations, which the bundle itself preprocesses."""
    from engines.verify import torch_reference
    from qvla_export.graph.golden import golden_actions

    golden = golden_actions(policy, plan, observations)
    feeds = tuple(bundle.processor.feeds(observation) for observation in observations)
    return torch_reference(bundle, replace(golden, feeds=feeds), "held-out")


def _held_out(place: str) -> "tuple[Observation, ...] | None":
    if place == _GOLDEN:
        return None
    from calibration.calibration_set import CalibrationSet

    return CalibrationSet.load(Path(place)).held_out


def _reference(
    bundle: "Bundle", wanted: _Comparison, held_out: "Sequence[Observation] | None"
) -> "Reference":
    from engines.verify import engine_reference, torch_reference
    from qvla_export.pipeline.run_folder import ROUNDING
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.quantizer.round_plan import with_rounding
    from qvla_export.quantizer.rounding import Rounding
    from qvla_export.shared.bundle import PLAN, Bundle

    if wanted.against == _GOLDEN:
        if held_out is not None:
            raise QvlaError(
                "a bundle stores torch's actions for its golden observations only; for those of "
                f"{wanted.observations} name a checkpoint or another bundle with --against"
            )
        return torch_reference(bundle)
    key = bundle.processor.statistics.key
    source = PolicySource(wanted.against, key, wanted.preset, wanted.threads)
    if source.kind == "server":
        raise QvlaError("--against takes golden, a bundle or a checkpoint folder, got a server")
    if source.kind == "bundle":
        other = Bundle.load(Path(wanted.against))
        feeds = None if held_out is None else tuple(map(bundle.processor.feeds, held_out))
        name = _GOLDEN if held_out is None else "held-out"
        with open_engine(other, wanted.runtime, wanted.threads) as engine:
            return engine_reference(bundle, other, engine, feeds, name)
    policy: Any = source()
    require_same("bundle and policy", bundle.policy_digest, policy.digest, "Export it again.")
    if held_out is None:
        return torch_reference(bundle)
    plan = None if bundle.plan is None else BitPlan.load(bundle.path / PLAN)
    beside = bundle.path.resolve().parent / ROUNDING
    if plan is not None and plan.quantizer.needs_moments and beside.is_file():
        plan = with_rounding(plan, Rounding.load(beside))
    return held_out_reference(bundle, policy, plan, held_out)


def _profile(
    bundle: "Bundle",
    engine: "Engine",
    held_out: "Sequence[Observation] | None",
    samples: int,
    load_ms: float,
    conditions: str,
) -> dict[str, Any]:
    from jetson.latency.measure import profile_latency
    from jetson.policy import EnginePolicy
    from jetson.serving.policy_contract import contract_of
    from qvla_export.pipeline.plan import bar

    policy, name = EnginePolicy(bundle, engine), bundle.path.resolve().name
    with Progress(transient=True) as progress:
        compared = profile_latency(
            {name: policy},
            held_out or [contract_of(policy).blank_observation()],
            samples=samples,
            progress=bar(progress, "latency"),
            load_ms={name: load_ms},
            conditions={name: conditions},
        )
    return compared.profiles[0].to_json()


def _say(verdict: "Verdict", report: dict[str, Any]) -> None:
    engine = verdict.engine
    typer.echo(
        f"{engine.runtime} ({engine.target}) against {verdict.against}, "
        f"{verdict.drift.observations} {verdict.observations} observations"
    )
    rows = {
        "engine": ("engine against its reference", verdict.drift),
        "action": ("engine against full precision", verdict.action_error),
        "plan": ("its reference against full precision", verdict.plan_error),
        "floor": ("float engine against torch", verdict.float_floor),
    }
    shown = {name: (text, drift) for name, (text, drift) in rows.items() if drift is not None}
    for name, (text, drift) in shown.items():
        typer.echo(f"{name}: {text}: cosine {drift.cosine:.7f}, RMS {drift.rms:.1e}")
    Console().print(_table({name: drift for name, (_, drift) in shown.items()}))
    if "latency" in report:
        total = report["latency"]["summary_ms"]["total"]
        where = f"latency on {engine.runtime}"
        p99 = total["p99"]
        worst = f"max {total['max']:.2f} ms" if p99 is None else f"p99 {p99:.2f} ms"
        typer.echo(f"{where}: p50 {total['p50']:.2f} ms, {worst}")
    if verdict.passed:
        typer.echo(f"verified: within {verdict.thresholds.reason}")


def _table(drifts: "dict[str, ActionDrift]") -> Table:
    table = Table(title="|difference| of normalized actions (range 2) and in the robot's units")
    for column in ("", "dimension", "max", "mean", "max, units", "mean, units"):
        table.add_column(column, justify="right" if column else "left")
    for name, drift in drifts.items():
        normalized = drift.max_normalized, drift.mean_normalized
        physical = drift.max_physical, drift.mean_physical
        for i, figures in enumerate(zip(*normalized, *physical, strict=True)):
            table.add_row(name if i == 0 else "", str(i), *(f"{f:.1e}" for f in figures))
    return table
