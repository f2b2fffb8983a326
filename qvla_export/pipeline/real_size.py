"""A policy of a published size through export, engines and one action.

Its weights are random and stay on disk; what counts is memory, bytes and time.
"""

import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from qvla_export.measurement.peak_memory import high_water_bytes
from qvla_export.shared.errors import QvlaError

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.observation import Observation

# Shares of the channels at each width: 4 mean bits.
MIX = "8:0.15,4:0.7,0:0.15"


@dataclass(frozen=True)
class RealSize:
    """What `qvla bench size` takes through the pipeline."""

    work: Path
    geometry: str
    target: str
    # Width -> share of the channels; None for float.
    mix: Mapping[int, float] | None
    layers_per_part: int

    @property
    def checkpoint(self) -> Path:
        """The random checkpoint."""
        return self.work / "checkpoint"

    @property
    def bundle(self) -> Path:
        """The bundle of this mix."""
        return self.work / ("float" if self.mix is None else "planned") / "bundle"


@dataclass(frozen=True)
class Step:
    """One step's cost, measured in a process of its own."""

    name: str
    seconds: float
    # Peak resident memory beyond that of the interpreter with its libraries imported.
    peak_bytes: int
    result: Mapping[str, Any]


def shares(text: str) -> dict[int, float] | None:
    if text == "float":
        return None
    try:
        return {int(b): float(s) for b, _, s in (item.partition(":") for item in text.split(","))}
    except ValueError as error:
        raise QvlaError(f"--mix takes WIDTH:SHARE,..., such as {MIX}, got {text!r}") from error


def checkpoint(wanted: RealSize) -> dict[str, Any]:
    from qvla_export.policies.families import family_with_size

    with Progress(transient=True) as progress:
        task = progress.add_task("checkpoint")
        family_with_size(wanted.geometry).write_random_checkpoint(
            wanted.checkpoint,
            wanted.geometry,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    files = [path.stat().st_size for path in wanted.checkpoint.iterdir()]
    return {"bytes": sum(files)}


def export(wanted: RealSize) -> dict[str, Any]:
    from engines.targets import find_target
    from qvla_export.graph.export import ExportOptions, export_bundle
    from qvla_export.policies.families import open_policy

    policy = open_policy(wanted.checkpoint, resident=False)
    plan = _plan(wanted, policy)
    observation = _observation(policy)
    with Progress(transient=True) as progress:
        task = progress.add_task("stages")
        bundle = export_bundle(
            policy,
            plan,
            find_target(wanted.target),
            [observation],
            wanted.bundle,
            ExportOptions(layers_per_part=wanted.layers_per_part),
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    return {
        "stages": len(bundle.parts),
        "bytes": bundle.nbytes,
        "float16_bytes": 2 * policy.stored_numbers(),
        "weight_bytes": dict(bundle.weight_bytes),
        "plan": bundle.plan,
    }


def _observation(policy: "Policy") -> "Observation":
    import numpy as np

    from qvla_export.shared.observation import Observation

    spec, generator = policy.processor.spec, np.random.default_rng(0)
    images = {
        name: generator.integers(0, 256, (224, 224, 3), dtype=np.uint8) for name in spec.cameras
    }
    state = generator.uniform(-1, 1, spec.state_dim).astype(np.float32)
    return Observation(images, "pick up the black bowl", state)


def _plan(wanted: RealSize, policy: "Policy") -> "BitPlan | None":
    from engines.targets import find_target
    from qvla_export.allocation.random_plan import draw_plan
    from qvla_export.policies.layers import layer_shapes

    if wanted.mix is None:
        return None
    shapes = layer_shapes(policy.layers())
    return draw_plan(shapes, wanted.mix, find_target(wanted.target), policy.digest)


def engines(wanted: RealSize) -> dict[str, Any]:
    from qvla_export.pipeline.build import build_bundle
    from qvla_export.shared.bundle import Bundle

    bundle = Bundle.load(wanted.bundle)
    built = build_bundle(bundle)
    return {"engines": len(built), "bytes": sum(sidecar.engine_bytes for sidecar in built)}


def act(wanted: RealSize) -> dict[str, Any]:
    import numpy as np

    from engines.ort import OrtEngine
    from qvla_export.shared.bundle import Bundle

    bundle = Bundle.load(wanted.bundle)
    golden = bundle.golden()
    with OrtEngine(bundle, keep_loaded=False) as engine:
        start = time.perf_counter()
        actions = engine.infer(golden.feeds[0])["actions"]
        action_s = time.perf_counter() - start
    error = np.abs(actions - golden.reference[:1])
    moved = np.abs(golden.reference - golden.full_precision)
    return {
        "action_s": action_s,
        "largest_drift_from_torch": float(error.max()),
        "largest_action": float(np.abs(golden.reference).max()),
        "largest_change_by_plan": float(moved.max()),
    }


def measured(name: str, step: Callable[[RealSize], dict[str, Any]], wanted: RealSize) -> Step:
    """Run a step in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(step, wanted, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        result, peak_bytes = receiver.recv()
    except EOFError:
        process.join()
        raise QvlaError(f"{name} ended with exit code {process.exitcode}") from None
    process.join()
    return Step(name, time.perf_counter() - start, peak_bytes, result)


def _child(
    step: Callable[[RealSize], dict[str, Any]], wanted: RealSize, sender: Connection
) -> None:
    # What every run of the command has in memory before it touches a weight.
    import onnxruntime  # noqa: F401  # imported for its memory
    import torch  # noqa: F401  # the same
    import transformers  # noqa: F401  # the same

    import qvla_export.graph.export  # noqa: F401  # the same

    before = high_water_bytes()
    result = step(wanted)
    sender.send((result, high_water_bytes() - before))
