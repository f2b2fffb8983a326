"""A policy of a published size through export, engines and one action.

Its weights are random and stay on disk; what counts is memory, bytes and time.
"""

import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qvla_export.measurement.peak_memory import high_water_bytes
from qvla_export.pipeline.progress import NumberedSteps, OnProgress, bar, ignore
from qvla_export.shared.artifacts import versions
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.tables.text_table import TextTable

if TYPE_CHECKING:
    from qvla_export.policies.base import Policy
    from qvla_export.quantizer.plan import BitPlan
    from qvla_export.shared.observation import Observation

# Shares of the channels at each width: 4 mean bits.
MIX = "8:0.15,4:0.7,0:0.15"
# Called with (units done, units in all).
_Report = Callable[[int, int], None]


@dataclass(frozen=True)
class RealSize:
    """What `qvla bench size` takes through the pipeline.

    Raises:
        QvlaError: the mix is neither "float" nor WIDTH:SHARE,...
    """

    # Folder for checkpoint, bundle and engines.
    work: Path
    geometry: str = "openvla-oft-7b"
    target: str = "rtx4070"
    # Shares of the channels at each width, or "float".
    mix: str = MIX
    # Decoder blocks in one part of the bundle.
    layers_per_part: int = 1
    # Whether engines are built, where the target has any, and an action is computed.
    with_engines: bool = True
    with_action: bool = True

    def __post_init__(self) -> None:
        _ = self.shares

    @property
    def shares(self) -> dict[int, float] | None:
        """Width -> share of the channels; None for float."""
        if self.mix == "float":
            return None
        items = (item.partition(":") for item in self.mix.split(","))
        try:
            return {int(bits): float(share) for bits, _, share in items}
        except ValueError as error:
            raise QvlaError(
                f"--mix takes WIDTH:SHARE,..., such as {MIX}, got {self.mix!r}"
            ) from error

    @property
    def checkpoint(self) -> Path:
        """The random checkpoint."""
        return self.work / "checkpoint"

    @property
    def bundle(self) -> Path:
        """The bundle of this mix."""
        return self.work / ("float" if self.shares is None else "planned") / "bundle"


@dataclass(frozen=True)
class Step:
    """One step's cost, measured in a process of its own."""

    name: str
    seconds: float
    # Peak resident memory beyond that of the interpreter with its libraries imported.
    peak_bytes: int
    result: Mapping[str, Any]


@dataclass(frozen=True)
class RealSizeFigures:
    """The cost of every step that ran."""

    request: RealSize
    steps: tuple[Step, ...]

    def to_json(self) -> dict[str, Any]:
        """Return request, versions and steps; on disk a bundle's part is called a stage."""
        return {
            "geometry": self.request.geometry,
            "target": self.request.target,
            "mix": self.request.mix,
            "layers_per_stage": self.request.layers_per_part,
            "command": " ".join(["qvla", *sys.argv[1:]]),
            "versions": versions(),
            "steps": [asdict(step) for step in self.steps],
        }

    def table(self) -> TextTable:
        """Return a row for each step, for a terminal."""
        columns = ("step", "minutes", "peak above the interpreter", "result")
        return TextTable(columns, title="real size", words=columns).with_rows(
            (
                step.name,
                f"{step.seconds / 60:.1f}",
                f"{step.peak_bytes / 1e9:.2f} GB",
                ", ".join(_figures(step.result)),
            )
            for step in self.steps
        )


def _figures(result: Mapping[str, Any]) -> Iterator[str]:
    for name, value in result.items():
        if isinstance(value, int):
            yield f"{name} {value:,}"
        elif isinstance(value, float):
            yield f"{name} {value:.4g}"


def measure_real_size(request: RealSize, on_progress: OnProgress = ignore) -> RealSizeFigures:
    """Take a random policy through checkpoint, export, engines and one action.

    A checkpoint that is there already is not made again.

    Raises:
        QvlaError: the geometry or the target are unknown, or a step's process dies.
    """
    builds = request.with_engines and request.target == "rtx4070"
    steps: dict[str, Callable[[RealSize, _Report], dict[str, Any]]] = {}
    if not request.checkpoint.is_dir():
        steps["checkpoint"] = _write_checkpoint
    steps["export"] = _export
    if builds:
        steps["engines"] = _build_engines
    if request.with_action:
        steps["one action"] = _act
    numbered = NumberedSteps(on_progress, len(steps))
    costs = []
    for name, step in steps.items():
        with numbered.next(name) as report:
            costs.append(_measure(name, step, request, bar(report, name)))
    return RealSizeFigures(request, tuple(costs))


def _write_checkpoint(request: RealSize, report: _Report) -> dict[str, Any]:
    from qvla_export.policies.families import family_with_size

    family = family_with_size(request.geometry)
    family.write_random_checkpoint(request.checkpoint, request.geometry, on_progress=report)
    files = [path.stat().st_size for path in request.checkpoint.iterdir()]
    return {"bytes": sum(files)}


def _export(request: RealSize, report: _Report) -> dict[str, Any]:
    from engines.targets import find_target
    from qvla_export.graph.export import ExportOptions, export_bundle
    from qvla_export.policies.families import load_policy

    policy = load_policy(request.checkpoint, resident=False)
    bundle = export_bundle(
        policy,
        _plan(request, policy),
        find_target(request.target),
        [_observation(policy)],
        request.bundle,
        ExportOptions(layers_per_part=request.layers_per_part),
        on_progress=report,
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
    shape = (*spec.frame_size, 3)
    images = {name: generator.integers(0, 256, shape, dtype=np.uint8) for name in spec.cameras}
    state = generator.uniform(-1, 1, spec.state_dim).astype(np.float32)
    return Observation(images, "pick up the black bowl", state)


def _plan(request: RealSize, policy: "Policy") -> "BitPlan | None":
    from engines.targets import find_target
    from qvla_export.allocation.random_plan import draw_plan
    from qvla_export.policies.layers import layer_shapes

    if request.shares is None:
        return None
    shapes = layer_shapes(policy.layers())
    return draw_plan(shapes, request.shares, find_target(request.target), policy.digest)


def _build_engines(request: RealSize, report: _Report) -> dict[str, Any]:
    from qvla_export.pipeline.build import build_bundle
    from qvla_export.shared.bundle import Bundle

    bundle = Bundle.load(request.bundle)
    built = build_bundle(bundle)
    return {"engines": len(built), "bytes": sum(sidecar.engine_bytes for sidecar in built)}


def _act(request: RealSize, report: _Report) -> dict[str, Any]:
    import numpy as np

    from engines.ort import OrtEngine
    from qvla_export.shared.bundle import Bundle

    bundle = Bundle.load(request.bundle)
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


def _measure(
    name: str,
    step: Callable[[RealSize, _Report], dict[str, Any]],
    request: RealSize,
    report: _Report,
) -> Step:
    """Run a step in a process of its own, so that its peak memory is its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_step, args=(step, request, sender))
    start = time.perf_counter()
    process.start()
    sender.close()
    try:
        while isinstance(message := receiver.recv(), tuple):
            report(*message)
    except EOFError:
        process.join()
        raise QvlaError(f"{name} ended with exit code {process.exitcode}") from None
    process.join()
    seconds = time.perf_counter() - start
    return Step(name, seconds, message["peak_bytes"], message["result"])


def _run_step(
    step: Callable[[RealSize, _Report], dict[str, Any]], request: RealSize, sender: Connection
) -> None:
    """Send (units done, units in all) as the step goes on, at last its result and peak memory."""
    # What every run of the command has in memory before it touches a weight.
    import onnxruntime  # noqa: F401  # imported for its memory
    import torch  # noqa: F401  # the same
    import transformers  # noqa: F401  # the same

    import qvla_export.graph.export  # noqa: F401  # the same

    before = high_water_bytes()
    result = step(request, lambda done, total: sender.send((done, total)))
    sender.send({"result": result, "peak_bytes": high_water_bytes() - before})
