"""Check a bundle or a graph, for a target, without running it."""

from pathlib import Path

from engines.check.finding import GraphFinding
from engines.check.graph_rules import check_imports, check_types
from engines.check.model import CheckedGraph, open_graph, shape_of
from engines.check.operator_rules import check_operators, check_products
from engines.check.ort_rules import check_ort
from engines.check.quantization_rules import check_quantization
from engines.check.rules import RULES
from engines.trt.modules import is_tensorrt
from qvla_export.shared.bundle import MANIFEST, Bundle
from qvla_export.shared.part import Part, TensorSpec
from qvla_export.shared.target import Target


def check_graph(graph: CheckedGraph, target: Target) -> tuple[GraphFinding, ...]:
    """Return every place of a graph that breaks a rule of a target, in graph order by kind."""
    graph = graph.for_runtime(target.runtime)
    if any(finding.rule == "graph.weights" for finding in graph.findings):
        return tuple(graph.findings)
    check_imports(graph, target)
    check_types(graph, target)
    check_operators(graph, target)
    if is_tensorrt(target):
        check_products(graph, target)
        check_quantization(graph, target)
    else:
        check_ort(graph, target)
    return tuple(graph.findings)


def check_model(path: Path, target: Target) -> tuple[GraphFinding, ...]:
    """Check one ONNX file, which is for no target in particular.

    Args:
        path: of the graph; its external weights lie where it says.
        target: whose rules it must keep.

    Raises:
        ArtifactError: the file is missing or is no ONNX graph.
    """
    return check_graph(open_graph(path, path.stem), target)


def check_bundle(bundle: Bundle, target: Target) -> tuple[GraphFinding, ...]:
    """Check a bundle's manifest and each of its graphs.

    Args:
        bundle: verified by `Bundle.load`.
        target: whose rules it must keep; another than the bundle's own is a finding.

    Raises:
        ArtifactError: a part is no ONNX graph.
    """
    found: list[GraphFinding] = []
    if bundle.target != target.name:
        rule = RULES["bundle.target"]
        message = (
            f"the bundle was made for target {bundle.target!r} and is not built for "
            f"{target.name!r}, even where the graphs are alike: its plan was priced in other "
            f"bytes and milliseconds; qvla export --target {target.name} makes one"
        )
        found.append(GraphFinding(rule.name, rule.severity, "", MANIFEST, "", message, rule.source))
    for part in bundle.parts:
        graph = open_graph(bundle.model_path(part), part.name)
        _check_contract(graph, part)
        found.extend(check_graph(graph, target))
    return tuple(found)


def check_path(path: Path, target: Target) -> tuple[GraphFinding, ...]:
    """Check a bundle folder or a bare ONNX file.

    Raises:
        ArtifactError: it is neither, or a bundle is damaged.
    """
    return check_bundle(Bundle.load(path), target) if path.is_dir() else check_model(path, target)


def _check_contract(graph: CheckedGraph, part: Part) -> None:
    sides = (
        ("inputs", part.inputs, graph.model.graph.inputs),
        ("outputs", part.outputs, graph.model.graph.outputs),
    )
    for side, specs, values in sides:
        stated = {spec.name: _type_of(spec) for spec in specs}
        real = {
            str(v.name): ("?" if v.dtype is None else v.dtype.numpy().name, shape_of(v))
            for v in values
        }
        if stated != real:
            graph.add(
                "bundle.contract",
                None,
                f"{side} of the graph are {real}, the manifest says {stated}; export it again",
            )


def _type_of(spec: TensorSpec) -> tuple[str, tuple[int, ...] | None]:
    sizes = tuple(size for size in spec.shape if isinstance(size, int))
    return spec.dtype, sizes if len(sizes) == len(spec.shape) else None
