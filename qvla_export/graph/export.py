"""Policy + plan -> bundle, part by part."""

import contextlib
import itertools
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from qvla_export.graph.bundle_writer import BundleContents, write_bundle
from qvla_export.graph.float_graph import POLICY_KEY, TARGET_KEY, ExportError
from qvla_export.graph.golden import (
    CutPolicy,
    golden_actions,
    golden_actions_in_parts,
    golden_calls,
)
from qvla_export.graph.graph_figures import GraphFigures
from qvla_export.graph.part_export import (
    ExportedPart,
    finished_part,
    total_bytes,
    total_figures,
    write_part,
)
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import layer_shapes
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.artifacts import read_json, require_same, versions, write_json
from qvla_export.shared.bundle import PLAN, Bundle, Golden
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import CHOSEN_TOKENS
from qvla_export.shared.target import Target

# Arithmetic of ONNX Runtime's MatMulNBits: 0 keeps activations in float32. 4 rounds them to 8 bits
# per block, which is faster but moves the action; see `engines.ort`.
FLOAT_ACTIVATIONS = {"accuracy_level": 0}
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportOptions:
    """How a policy becomes a bundle, beside its plan and its target."""

    # Result of `export_float(policy, target)`, to share it between plans; parts that are not in it
    # are traced.
    float_graphs: Mapping[str, ir.Model] = field(default_factory=dict)
    # Stored in the manifest and obeyed by the engine.
    engine_options: Mapping[str, Any] = field(default_factory=lambda: FLOAT_ACTIVATIONS)
    # Decoder blocks a part; None makes one graph of the whole policy.
    layers_per_part: int | None = None


DEFAULT_OPTIONS = ExportOptions()


def export_bundle(
    policy: Policy,
    plan: BitPlan | None,
    target: Target,
    observations: Sequence[Observation],
    path: Path,
    options: ExportOptions = DEFAULT_OPTIONS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Bundle:
    """Write the bundle of a policy under a plan.

    An interrupted export goes on at the first part it had not finished.

    Args:
        policy: the full-precision policy; its weights may have been left on disk.
        plan: widths of the channels; None for the float bundle.
        target: what the bundle is made for; must be the plan's.
        observations: held-out; become the golden observations.
        path: folder to create or replace.
        options: a float graph that was traced before, the engine's options, how to cut the policy.
        on_progress: called with (steps done, steps in all): parts, then the calls of parts that
            golden actions take where weights are on disk.

    Raises:
        PlanMismatch, ArtifactMismatch: the plan or the float graph is for another policy or target.
        ExportError: a planned layer cannot be bucketed, or there are no observations.
    """
    if not observations:
        raise ExportError("a bundle needs at least one golden observation, got none")
    layers = policy.layers()
    if plan is not None:
        require_same("plan and target", plan.target, target.name, "Make the plan for this target.")
        plan.require_fits(layer_shapes(layers), policy.digest)
    graphs, layers_per_part = options.float_graphs, options.layers_per_part
    for graph in graphs.values():
        _require_traced_from(graph, policy, target)
    parts, program = policy.parts(layers_per_part), policy.program(layers_per_part)
    calls = 0 if layers_per_part is None else golden_calls(program, plan)
    done = _counter(len(parts) + calls, on_progress)
    with _unfinished(path, _identity(policy, plan, target, layers_per_part)) as folder:
        exported = []
        for part in parts:
            exported.append(
                finished_part(folder, part.name)
                or write_part(policy, part, layers, plan, target, folder, graphs.get(part.name))
            )
            done()
        _require_all_planned(exported, layers)
        if layers_per_part is None:
            golden = golden_actions(policy, plan, observations)
        else:
            reads = {item.part.name: item.weights for item in exported}
            cut = CutPolicy(policy, parts, program, reads)
            golden = golden_actions_in_parts(cut, plan, observations, done)
        contents = _contents(policy, plan, target, exported, golden, options)
        bundle = write_bundle(path, contents, lambda new: _take_over(folder, new, exported, plan))
    _LOGGER.info("bundle %s: %d bytes, %s", path, bundle.nbytes, dict(contents.weight_bytes))
    return bundle


def _counter(total: int, on_progress: Callable[[int, int], None] | None) -> Callable[[], None]:
    """Return what tells `on_progress` of one more step each time it is called."""
    steps = itertools.count(1)

    def done() -> None:
        if on_progress is not None:
            on_progress(next(steps), total)

    return done


def _contents(
    policy: Policy,
    plan: BitPlan | None,
    target: Target,
    exported: Sequence[ExportedPart],
    golden: Golden,
    options: ExportOptions,
) -> BundleContents:
    parts, program = tuple(item.part for item in exported), policy.program(options.layers_per_part)
    outputs = {spec.name: spec for part in parts for spec in part.outputs}
    inputs = {spec.name: spec for part in parts for spec in part.inputs}
    # What a part hands on, under its own name or another.
    starts = [pair for run in program.runs for pair in run.start.items()]
    inside = {*outputs, *(name for name, _ in starts)}
    taken = [spec for name, spec in inputs.items() if name not in inside]
    # What no part makes and a loop begins with.
    taken += [
        replace(inputs[name], name=source)
        for name, source in starts
        if source not in outputs and source not in inputs
    ]
    return BundleContents(
        target=target.name,
        processor=policy.processor,
        inputs=tuple(taken),
        outputs=tuple(outputs[name] for name in ("actions", CHOSEN_TOKENS) if name in outputs),
        parts=parts,
        program=program,
        golden=golden,
        policy_digest=policy.digest,
        weight_bytes=total_bytes(exported),
        plan=None if plan is None else _summary(plan, total_figures(exported)),
        engine_options=options.engine_options,
    )


def _identity(
    policy: Policy, plan: BitPlan | None, target: Target, layers_per_part: int | None
) -> dict[str, Any]:
    """Return what must be equal for the parts of an interrupted export to be used."""
    return {
        "policy_digest": policy.digest,
        "plan_digest": None if plan is None else plan.digest,
        "rounding_digest": _rounding_digest(plan),
        "target": target.name,
        "layers_per_stage": layers_per_part,
        "versions": versions(),
    }


def unfinished_folder(path: Path) -> Path:
    """Return where the parts of a bundle lie while its export is under way."""
    return path.with_name(f".{path.name}.unfinished")


@contextlib.contextmanager
def _unfinished(path: Path, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder of the parts done so far; it is removed only if the block succeeds."""
    folder = unfinished_folder(path)
    stated = folder / "identity.json"
    if folder.exists() and not (stated.is_file() and read_json(stated, "identity") == identity):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(stated, identity)
    yield folder
    shutil.rmtree(folder)


def _take_over(
    folder: Path, new: Path, exported: Sequence[ExportedPart], plan: BitPlan | None
) -> None:
    """Put the finished parts into the bundle's folder; links, since they may be large."""
    for item in exported:
        for name in (item.part.model, f"{item.part.model}.data"):
            (new / name).hardlink_to(folder / name)
    if plan is not None:
        plan.save(new / PLAN)


def _require_all_planned(exported: Iterable[ExportedPart], layers: Iterable[str]) -> None:
    found = {name.removesuffix(".weight") for item in exported for name in item.weights}
    if missing := sorted(set(layers) - found):
        raise ExportError(f"layers not found in the exported graphs: {missing}")


def _require_traced_from(graph: ir.Model, policy: Policy, target: Target) -> None:
    for key, expected in ((POLICY_KEY, policy.digest), (TARGET_KEY, target.name)):
        found = graph.metadata_props.get(key, "nothing")
        require_same(f"float graph and {key}", found, expected, "Export the float graph anew.")


def _rounding_digest(plan: BitPlan | None) -> str | None:
    return None if plan is None or plan.rounding is None else plan.rounding.digest


def _summary(plan: BitPlan, figures: GraphFigures) -> dict[str, Any]:
    return {
        "budget": plan.budget,
        "rounding_digest": _rounding_digest(plan),
        "mean_bits_per_channel": plan.mean_bits_per_channel,
        "mean_bits_per_weight": plan.mean_bits_per_weight,
        "stored_bits_per_weight": plan.stored_bits_per_weight,
        "weight_bytes": plan.weight_bytes,
        "float16_bytes": plan.float16_bytes,
        "channels_by_width": {str(bits): n for bits, n in plan.histogram().items()},
        "graph": asdict(figures),
    }
