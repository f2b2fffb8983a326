"""The step that judges an engine against torch or any other engine."""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qvla_export.pipeline.build import build_bundle, require_target
from qvla_export.pipeline.policy_source import PolicySource
from qvla_export.pipeline.progress import OnProgress, bar, ignore
from qvla_export.shared.artifacts import require_same, versions
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import WeightForm

if TYPE_CHECKING:
    from engines.base import Engine
    from engines.verify import Reference, Verdict
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.bundle import Bundle, Golden
    from qvla_export.shared.observation import Observation

GOLDEN = "golden"
_FORMAT = "qvla.verification/1"
RuntimeName = Literal["auto", "ort", "openvino", "torch"]


@dataclass(frozen=True)
class Verification:
    """What a bundle's engine is compared with, and how it runs."""

    # "golden" (torch's stored actions), or a bundle or checkpoint folder.
    against: str = GOLDEN
    # "golden", or the folder of a calibration set, whose held-out part is meant.
    observations: str = GOLDEN
    # Float bundle of the same policy; its drift is the floor.
    float_bundle: Path | None = None
    # Refuses a bundle for another; its engines are built if absent.
    target: str | None = None
    # "auto" is the tuned or the target's own, "ort" ONNX Runtime on the CPU,
    # "torch" its graphs on a GPU or the CPU.
    runtime: RuntimeName = "auto"
    against_runtime: RuntimeName = "ort"
    # Actions of a latency profile of an engine that passes; 0 for none.
    samples: int = 0
    # Of a checkpoint that is compared with.
    preset: str | None = None
    threads: int | None = None
    weights: WeightForm = "tuned"


@dataclass(frozen=True)
class VerificationReport:
    """What came of it."""

    verdict: "Verdict"
    # A profile, see `jetson.latency.profile`; None where none was taken.
    latency: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the report that is written to disk."""
        latency = {} if self.latency is None else {"latency": self.latency}
        return {"format": _FORMAT, **self.verdict.to_json(), "versions": versions(), **latency}


def verify(
    bundle: "Bundle", request: Verification | None = None, on_progress: OnProgress = ignore
) -> VerificationReport:
    """Compare a bundle's engine with a reference; the verdict says whether it passed.

    Raises:
        QvlaError: the two do not belong together, or an engine cannot be had here.
    """
    from engines.verify import float_drift, judge

    request = request or Verification()
    if request.target is not None:
        require_target(bundle, request.target)
        if request.runtime == "auto":
            build_absent_engines(bundle, on_progress)
    with ExitStack() as stack:
        start = time.perf_counter()
        engine = stack.enter_context(_open(bundle, request))
        load_ms = (time.perf_counter() - start) * 1e3
        held_out = _held_out(request.observations)
        reference = _reference(bundle, request, held_out)
        floor = None
        if request.float_bundle is not None:
            plain = _same_policy(request.float_bundle, bundle)
            floor = float_drift(plain, stack.enter_context(_open(plain, request)), reference)
        verdict = judge(bundle, engine, reference, floor)
        if not request.samples or not verdict.passed:
            return VerificationReport(verdict)
        latency = _profile(bundle, engine, held_out, request, load_ms, on_progress)
        return VerificationReport(verdict, latency)


def _open(bundle: "Bundle", request: Verification) -> "Engine":
    return open_engine(bundle, request.runtime, request.threads, request.weights)


def _same_policy(float_bundle: Path, bundle: "Bundle") -> "Bundle":
    from qvla_export.shared.bundle import Bundle

    plain, remedy = Bundle.load(float_bundle), "Give the float bundle of the same policy."
    digests = (bundle.policy_digest, plain.policy_digest)
    require_same("bundle and float bundle", *digests, remedy)
    return plain


def open_engine(
    bundle: "Bundle",
    runtime: RuntimeName,
    threads: int | None,
    weights: WeightForm = "packed",
) -> "Engine":
    """Load a bundle's engine: of its target, or of another runtime on this CPU."""
    from engines.load import load_engine

    return load_engine(bundle, threads, weights, runtime=None if runtime == "auto" else runtime)


def build_absent_engines(bundle: "Bundle", on_progress: OnProgress = ignore) -> None:
    """Build the engines of a TensorRT bundle; up to date ones are kept.

    Raises:
        EngineError: this machine cannot run them, or they cannot be built.
    """
    from engines.base import EngineError
    from engines.targets import find_target
    from engines.trt.gpu import find_gpu
    from engines.trt.modules import is_tensorrt

    target = find_target(bundle.target)
    if not is_tensorrt(target):
        return
    gpu = find_gpu()
    if gpu is None or gpu.compute_capability != target.compute_capability:
        present = "none" if gpu is None else f"{gpu.name} ({gpu.compute_capability})"
        raise EngineError(
            f"engines for target {target.name!r} run on an NVIDIA GPU of compute capability "
            f"{target.compute_capability} with its driver, found here: {present}. Run this command "
            "there; here, --runtime ort checks the bundle's graphs on the CPU"
        )
    build_bundle(bundle, on_progress=on_progress)


def held_out_reference(
    bundle: "Bundle",
    policy: "Policy",
    plan: "BitPlan | None",
    observations: "Sequence[Observation]",
) -> "Reference":
    """Return torch's actions on held-out observations, which the bundle itself preprocesses."""
    from engines.verify import torch_reference

    golden = _golden(policy, plan, observations)
    feeds = tuple(bundle.processor.feeds(observation) for observation in observations)
    return torch_reference(bundle, replace(golden, feeds=feeds), "held-out")


def _golden(
    policy: "Policy", plan: "BitPlan | None", observations: "Sequence[Observation]"
) -> "Golden":
    """Return torch's actions; of a policy whose weights lie on disk, part by part."""
    import torch

    from qvla_export.graph.golden import CutPolicy, golden_actions, golden_actions_in_parts
    from qvla_export.measurement.part_needs import part_needs
    from qvla_export.policies.layers import traced_layers, weights_on_disk

    if not weights_on_disk(policy):
        return golden_actions(policy, plan, observations)
    feeds = policy.processor.feeds(observations[0])
    example = {name: torch.from_numpy(value) for name, value in feeds.items()}
    needs = part_needs(policy, traced_layers(policy), example)
    reads = {need.part.name: need.reads for need in needs}
    cut = CutPolicy(policy, policy.parts(1), policy.program(1), reads)
    return golden_actions_in_parts(cut, plan, observations)


def _held_out(place: str) -> "tuple[Observation, ...] | None":
    if place == GOLDEN:
        return None
    from calibration.calibration_set import CalibrationSet

    return CalibrationSet.load(Path(place)).held_out


def _reference(
    bundle: "Bundle", request: Verification, held_out: "Sequence[Observation] | None"
) -> "Reference":
    from engines.verify import engine_reference, torch_reference
    from qvla_export.pipeline.run_folder import ROUNDING
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.quantizer.round_plan import with_rounding
    from qvla_export.quantizer.rounding import Rounding
    from qvla_export.shared.bundle import PLAN, Bundle

    if request.against == GOLDEN:
        if held_out is not None:
            raise QvlaError(
                "a bundle stores torch's actions for its golden observations only; for those of "
                f"{request.observations} name a checkpoint or another bundle with --against"
            )
        return torch_reference(bundle)
    key = bundle.processor.statistics.key
    source = PolicySource(request.against, key, request.preset, request.threads)
    if source.kind == "server":
        raise QvlaError("--against takes golden, a bundle or a checkpoint folder, got a server")
    if source.kind == "bundle":
        other = Bundle.load(Path(request.against))
        feeds = None if held_out is None else tuple(map(bundle.processor.feeds, held_out))
        name = GOLDEN if held_out is None else "held-out"
        with open_engine(other, request.against_runtime, request.threads) as engine:
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
    request: Verification,
    load_ms: float,
    on_progress: OnProgress,
) -> dict[str, Any]:
    from jetson.latency.measure import ProfileSubject, profile_latency
    from jetson.policy import EnginePolicy
    from jetson.serving.policy_contract import contract_of

    policy, name = EnginePolicy(bundle, engine), bundle.path.resolve().name
    conditions = f"{request.threads or 'all'} threads, {engine.weight_form}"
    compared = profile_latency(
        {name: ProfileSubject(policy, load_ms, conditions)},
        held_out or [contract_of(policy).blank_observation()],
        samples=request.samples,
        on_progress=bar(on_progress, "latency"),
    )
    return compared.profiles[0].to_json()
