"""Open a graph for checking: element types inferred, constants read only when asked for."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.check.finding import GraphFinding
from engines.check.rules import RULES
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.target import Runtime

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# Operators that leave a constant a constant on its way to DequantizeLinear.
_KEEP_CONSTANT = ("Cast", "Identity")
_BUILT = "TensorRT-RTX 1.7.1 builds it all the same: compare what it computes, and its bytes"


@dataclass(frozen=True)
class CheckedGraph:
    """A graph with what the rules ask about it, and the findings so far."""

    # Name of the part, for findings.
    part: str
    model: "ir.Model"
    findings: list[GraphFinding] = field(default_factory=list)
    # Which runtime is to build it; None before that is known.
    runtime: Runtime | None = None

    @property
    def nodes(self) -> "Iterator[ir.Node]":
        """Nodes of the graph in order; those of subgraphs belong to an unsupported operator."""
        return iter(self.model.graph)

    @property
    def opset(self) -> int:
        """Imported operator set of the default domain; 0 if there is none."""
        return self.model.graph.opset_imports.get("", 0)

    @cached_property
    def boundary(self) -> "frozenset[ir.Value]":
        """Inputs and outputs of the graph."""
        return frozenset([*self.model.graph.inputs, *self.model.graph.outputs])

    def for_runtime(self, runtime: Runtime) -> "CheckedGraph":
        """Return the graph as one runtime is to build it, with the findings so far."""
        findings = [_weigh(finding, runtime) for finding in self.findings]
        return replace(self, findings=findings, runtime=runtime)

    def add(
        self,
        rule: str,
        node: "ir.Node | ir.Value | None",
        message: str,
        rtx_builds: bool = False,
    ) -> None:
        """Record a finding at a node, a constant, or the graph as a whole.

        Args:
            rule: its name.
            node: where; None for the graph as a whole.
            message: the rule, the value found and the remedy.
            rtx_builds: whether TensorRT for RTX was seen to build this way of breaking the rule.
        """
        severity, source = RULES[rule].severity, RULES[rule].source
        name = "" if node is None else str(node.name)
        op = str(getattr(node, "op_type", ""))
        finding = GraphFinding(rule, severity, self.part, name, op, message, source)
        self.findings.append(_weigh(finding, self.runtime, rtx_builds))


def _weigh(
    finding: GraphFinding, runtime: Runtime | None, rtx_builds: bool = False
) -> GraphFinding:
    """Return a finding as a warning where its runtime is known to build the graph all the same."""
    builds = runtime == "tensorrt_rtx" and (rtx_builds or RULES[finding.rule].rtx_builds)
    if finding.severity == "warning" or not builds:
        return finding
    return replace(finding, severity="warning", message=f"{finding.message}. {_BUILT}")


def open_graph(path: Path, part: str) -> CheckedGraph:
    """Read an ONNX file; weights stay on disk until a rule reads their numbers.

    Raises:
        ArtifactError: the file is missing or is no ONNX graph.
    """
    import onnx_ir

    if not path.is_file():
        raise ArtifactError(f"graph not found: {path}; name a bundle folder or an .onnx file")
    try:
        model = onnx_ir.load(path)
    except Exception as error:  # protobuf and onnx_ir raise whatever the bytes led them to
        raise ArtifactError(f"{path} is no ONNX graph: {error}; export it again") from error
    if not model.graph.outputs:  # an empty file is a valid protobuf message
        raise ArtifactError(f"{path} is a graph without outputs; export it again")
    return of_model(model, part)


def of_model(model: "ir.Model", part: str) -> CheckedGraph:
    """Return a graph in memory for checking; its values get the types that ONNX infers.

    Types that the file states of anything but inputs and constants are not believed.
    """
    # They log what is missing or wrong value by value; the rules say so in one line.
    for chatty in ("onnx_ir.passes.common.shape_inference", "onnx_ir.serde"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    graph = CheckedGraph(part, model)
    _check_weights(graph)
    if graph.findings:  # nothing can be inferred
        return graph
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and value.shape is not None and value.shape != tensor.shape:
            graph.add(
                "graph.constant-shape",
                value,
                f"constant {value.name!r} is stated with shape {list(value.shape)} and stored "
                f"with {list(tensor.shape)}; export it again",
            )
            value.shape = None  # or nothing at all would be inferred
    stated = {value: value.type for value in model.graph.outputs}
    shapes = {value: value.shape for value in model.graph.outputs}
    for node in model.graph:
        for value in node.outputs:
            value.type = None
    _infer(model)
    for value, kind in stated.items():
        if value.type is None:
            value.type = kind
        elif kind is not None and value.dtype != kind.dtype:
            graph.add(
                "graph.output-type",
                value.producer(),
                f"output {value.name!r} is stated as {kind.dtype.name} and computed as "
                f"{dtype_name(value)}; insert a Cast",
            )
    for value, shape in shapes.items():
        value.shape = _told(value.shape, shape)
    return graph


def _infer(model: "ir.Model") -> None:
    """Give a graph's values the types and sizes that ONNX infers."""
    from onnx_ir.passes.common import ShapeInferencePass

    # The one operator of the table that ONNX (1.23.2) infers nothing of; types and sizes go through
    # it as through InstanceNormalization.
    grouped = [node for node in model.graph if node.op_type == "GroupNormalization"]
    for node in grouped:
        node.op_type = "InstanceNormalization"
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for node in grouped:
        node.op_type = "GroupNormalization"


def _told(inferred: "ir.Shape | None", stated: "ir.Shape | None") -> "ir.Shape | None":
    """Return an output's inferred shape, with the stated sizes where inference cannot tell.

    The last row of any number of them is one row, which inference does not see.
    """
    import onnx_ir

    if inferred is None or stated is None or len(inferred) != len(stated):
        return inferred
    pairs = zip(inferred, stated, strict=True)
    return onnx_ir.Shape([size if isinstance(size, int) else told for size, told in pairs])


def _check_weights(graph: CheckedGraph) -> None:
    """Check that constants kept in files beside the graph are there, whole."""
    import onnx_ir

    for value in graph.model.graph.initializers.values():
        tensor = value.const_value
        if not isinstance(tensor, onnx_ir.ExternalTensor):
            continue
        path = Path(tensor.path)
        missing = not path.is_file()
        if missing or path.stat().st_size < (tensor.offset or 0) + (tensor.length or 0):
            problem = "is missing" if missing else "is too short"
            graph.add(
                "graph.weights",
                value,
                f"constant {value.name!r} is kept in {tensor.location}, which {problem}; copy the "
                "file beside the graph",
            )


def schema_of(node: "ir.Node", opset: int) -> "onnx.defs.OpSchema | None":
    """Return the schema of a node's operator; None if the operator set has no such operator."""
    import onnx

    try:
        return onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return None


def missing_inputs(node: "ir.Node", schema: "onnx.defs.OpSchema") -> str | None:
    """Say which inputs a node lacks or has too many; None if they fit the schema."""
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        return f"between {schema.min_input} and {schema.max_input}, the node has {len(node.inputs)}"
    for index in range(schema.min_input):
        if node.inputs[index] is None:
            return f"its input {index}, the node leaves it out"
    return None


def foreign_types(
    node: "ir.Node", schema: "onnx.defs.OpSchema"
) -> "list[tuple[ir.Value, list[str]]]":
    """Return the inputs whose element type the operator does not have, with those it has."""
    found = []
    last = len(schema.inputs) - 1
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype is None:
            continue
        allowed = schema.inputs[min(index, last)].types
        if f"tensor({value.dtype.name.lower()})" not in allowed:
            found.append((value, sorted(allowed)))
    return found


def type_groups(node: "ir.Node", schema: "onnx.defs.OpSchema") -> "list[list[ir.Value]]":
    """Return the inputs that must have one element type, group by group."""
    groups: dict[str, list[ir.Value]] = {}
    last = len(schema.inputs) - 1
    for index, value in enumerate(node.inputs):
        formal = schema.inputs[min(index, last)]
        if value is not None and (index <= last or formal.is_homogeneous):
            groups.setdefault(formal.type_str, []).append(value)
    return [values for values in groups.values() if len(values) > 1]


def dtype_name(value: "ir.Value | None") -> str:
    """Return an element type's name in ONNX, "FLOAT16"; empty if it is not known."""
    return "" if value is None or value.dtype is None else value.dtype.name


def shape_of(value: "ir.Value | None") -> tuple[int, ...] | None:
    """Return a shape whose every size is known, else None."""
    if value is None or value.shape is None:
        return None
    sizes = tuple(size for size in value.shape if isinstance(size, int))
    return sizes if len(sizes) == len(value.shape) else None


def constant_root(value: "ir.Value | None") -> "ir.Value | None":
    """Return the constant a value is made of by Cast and Identity alone; None if there is none."""
    while value is not None:
        producer = value.producer()
        if producer is None:
            return value if value.const_value is not None else None
        if producer.op_type == "Constant":
            return value if _constant(value) is not None else None
        if producer.op_type not in _KEEP_CONSTANT or not producer.inputs:
            return None
        value = producer.inputs[0]
    return None


def folded_from(value: "ir.Value | None") -> "list[ir.Value] | None":
    """Return the constants that a value is computed from, by whatever operators.

    None if it depends on anything else. ONNX Runtime folds all such values when it loads a graph.
    """
    if value is None:
        return []
    producer = value.producer()
    if producer is None:
        return [value] if value.const_value is not None else None
    if producer.op_type == "Constant":
        return [value] if _constant(value) is not None else None
    found: list[ir.Value] = []
    for item in producer.inputs:
        constants = folded_from(item)
        if constants is None:
            return None
        found += constants
    return found if producer.inputs else None


def numbers(root: "ir.Value") -> NDArray[Any]:
    """Read the numbers of a constant; nothing of them is kept."""
    tensor = _constant(root)
    assert tensor is not None, f"{root.name} is no constant"
    return np.asarray(tensor.numpy())


def _constant(value: "ir.Value") -> "ir.TensorProtocol | None":
    from onnx_ir import convenience

    try:
        return convenience.get_const_tensor(value)
    except ValueError:  # a Constant without its one value, or with another's attribute
        return None


def consumers(value: "ir.Value") -> "list[tuple[ir.Node, int]]":
    """Return the nodes that read a value, with the index of the input."""
    return [(use.node, use.idx) for use in value.uses()]
