"""One part of a policy -> its graph and weights on disk, and what is known about them."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from qvla_export.graph.external_data import ExternalData
from qvla_export.graph.float_graph import WEIGHTS_KEY, export_part, layer_nodes, policy_weights
from qvla_export.graph.graph_figures import GraphFigures, measure_graph
from qvla_export.graph.lowering import lower
from qvla_export.graph.passes.name_nodes import name_nodes
from qvla_export.policies.base import Policy, PolicyPart
from qvla_export.quantizer.plan import BitPlan
from qvla_export.shared.artifacts import read_json, write_json
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.part import Part, TensorSpec, part_from_json
from qvla_export.shared.target import Target

# Of a quantized graph: how another program than this project's engine must run it.
RUN_KEY = "qvla.run_with"
RUN_NOTE = (
    "Set ONNX Runtime's session option session.qdq_matmulnbits_accuracy_level to engine_options."
    "accuracy_level of the bundle's manifest.json (0 unless exported otherwise). By default ONNX "
    "Runtime takes 4: it rounds activations to 8 bits a block, which moved actions 2.9 to 8 times "
    "more than the quantized weights did."
)


@dataclass(frozen=True)
class ExportedPart:
    """A part on disk."""

    part: Part
    # Bytes of the graph's constants by kind; see `qvla_export.graph.lowering.lower`.
    weight_bytes: Mapping[str, int]
    figures: GraphFigures
    # Parameters and buffers of the policy that the part reads.
    weights: tuple[str, ...]


def write_part(
    policy: Policy,
    part: PolicyPart,
    layers: Mapping[str, nn.Module],
    plan: BitPlan | None,
    target: Target,
    folder: Path,
    graph: ir.Model | None = None,
) -> ExportedPart:
    """Write `<part>.onnx`, `<part>.onnx.data` and last, so that it vouches for them, a record.

    Args:
        policy: where the weights are read.
        part: one of its parts.
        layers: its quantizable layers.
        plan: of the whole policy; None for float.
        target: what the graph is made for.
        folder: where to write.
        graph: the part's float graph, if it was traced before.
    """
    graph = graph or export_part(policy, part, layers, target)
    inside = [name for name in layer_nodes(graph) if plan is not None and name in plan.widths]
    own = None if plan is None or not inside else plan.restricted_to(inside)
    path = folder / f"{part.name}.onnx"
    with ExternalData(path) as data:
        model, weight_bytes = lower(graph, own, target, data.store)
        figures = measure_graph(model, own)
        name_nodes(model)
        model.metadata_props.pop(WEIGHTS_KEY, None)
        if plan is not None and target.runtime in ("ort", "ort-cuda"):
            model.metadata_props[RUN_KEY] = RUN_NOTE
        data.save(model)
    exported = ExportedPart(
        Part(part.name, _specs(graph.graph.inputs), _specs(graph.graph.outputs)),
        weight_bytes,
        figures,
        policy_weights(graph),
    )
    files = {p.name: p.stat().st_size for p in (path, path.with_name(f"{path.name}.data"))}
    record = {
        "stage": asdict(exported.part),
        "weight_bytes": dict(weight_bytes),
        "figures": asdict(figures),
        "weights": exported.weights,
        "files": files,
    }
    write_json(_record(folder, part.name), record)
    return exported


def finished_part(folder: Path, name: str) -> ExportedPart | None:
    """Return a part that an interrupted export had finished; None if it had not."""
    try:
        value = read_json(_record(folder, name), "part record")
        whole = all((folder / n).stat().st_size == size for n, size in value["files"].items())
    except (ArtifactError, OSError, KeyError, TypeError):
        return None
    return _from_json(value) if whole else None


def total_figures(parts: Iterable[ExportedPart]) -> GraphFigures:
    """Return the figures of all graphs together."""
    found = [asdict(part.figures) for part in parts]
    return GraphFigures(**{name: sum(f[name] for f in found) for name in found[0]})


def total_bytes(parts: Iterable[ExportedPart]) -> dict[str, int]:
    """Return the bytes of all graphs' constants by kind."""
    total: dict[str, int] = {}
    for part in parts:
        for kind, nbytes in part.weight_bytes.items():
            total[kind] = total.get(kind, 0) + nbytes
    return total


def _record(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _from_json(value: Mapping[str, Any]) -> ExportedPart:
    return ExportedPart(
        part_from_json(value["stage"]),
        value["weight_bytes"],
        GraphFigures(**value["figures"]),
        tuple(value["weights"]),
    )


def _specs(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    return tuple(_spec(value) for value in values)


def _spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None and value.dtype is not None and value.shape is not None
    sizes = tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
    return TensorSpec(value.name, value.dtype.numpy().name, sizes)
