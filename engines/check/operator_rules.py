"""Rules of operators, operator sets and element types."""

import difflib
from typing import TYPE_CHECKING

from engines.check.model import (
    CheckedGraph,
    constant_root,
    dtype_name,
    foreign_types,
    missing_inputs,
    schema_of,
    shape_of,
    type_groups,
)
from engines.check.operators import OLDER, OPERATORS, UNSUPPORTED, Limit, Operator
from engines.check.quantization_node import WEIGHT_INPUT
from engines.check.runtimes import (
    ONNX_COMPUTE,
    missing_type,
    operator_version,
    reader,
)
from engines.trt.modules import is_tensorrt
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


def check_imports(graph: CheckedGraph, target: Target) -> None:
    """Check operator set, IR version and domains of the graph as a whole."""
    known = reader(target)
    if graph.opset > known.known_opset:
        graph.add(
            "graph.opset",
            None,
            f"target {target.name!r} reads operator sets up to {known.known_opset} "
            f"({known.source}), the graph imports {graph.opset}; export at {target.opset}",
        )
    elif graph.opset > known.documented_opset:
        graph.add(
            "graph.opset-undocumented",
            None,
            f"target {target.name!r} documents operator sets up to {known.documented_opset} "
            f"({known.source}), the graph imports {graph.opset}; its parser must be tried there",
        )
    if graph.model.ir_version > known.ir_version:
        graph.add(
            "graph.ir-version",
            None,
            f"target {target.name!r} knows IR versions up to {known.ir_version}, the graph has "
            f"{graph.model.ir_version}; export with IR version {target.ir_version}",
        )


def check_types(graph: CheckedGraph, target: Target) -> None:
    """Check element types of every constant, input and output of a node."""
    values = {*graph.boundary, *graph.model.graph.initializers.values()}
    values |= {v for n in graph.nodes for v in n.outputs if n.op_type != "QuantizeLinear"}
    for value in sorted(values, key=lambda value: str(value.name)):
        dtype = dtype_name(value)
        reason = missing_type(dtype, target)
        at = value.producer() or value
        if reason is not None:
            graph.add(
                "type.missing",
                at,
                f"target {target.name!r} has no {dtype} tensors: {reason}; {value.name!r} is one",
            )
        elif is_tensorrt(target) and dtype == "UINT8" and value not in graph.boundary:
            graph.add(
                "type.uint8",
                at,
                f"UINT8 is for inputs and outputs of the graph, {value.name!r} is neither; "
                "use INT8 or INT32",
            )


def check_operators(graph: CheckedGraph, target: Target) -> None:
    """Check that every node's operator exists on the target, with its types and limits."""
    for node in graph.nodes:
        schema = _find_schema(graph, node, target)
        if schema is None:
            continue
        if (wrong := missing_inputs(node, schema)) is not None:
            graph.add("operator.inputs", node, f"{node.op_type} needs {wrong}; export it again")
            continue
        foreign = foreign_types(node, schema)
        for value, allowed in foreign:
            if missing_type(dtype_name(value), target) is None:
                graph.add(
                    "operator.type",
                    node,
                    f"{node.op_type} of operator set {graph.opset} takes {', '.join(allowed)}, "
                    f"{value.name!r} is {dtype_name(value)}; insert a Cast",
                )
        if foreign:
            continue
        _check_equal_types(graph, node, type_groups(node, schema))
        if is_tensorrt(target) and (operator := OPERATORS.get(node.op_type)) is not None:
            _check_operator(graph, node, operator, target)
        typed = all(dtype_name(value) for value in node.inputs if value is not None)
        if typed and not any(dtype_name(value) for value in node.outputs):
            graph.add(
                "graph.untyped",
                node,
                f"ONNX infers no type for {node.outputs[0].name!r}; check the node's inputs",
            )


def _find_schema(
    graph: CheckedGraph, node: "ir.Node", target: Target
) -> "onnx.defs.OpSchema | None":
    """Return an operator's schema; None, with a finding, if the target lacks the operator."""
    tensorrt = is_tensorrt(target)
    if node.domain not in ("", "ai.onnx") and (tensorrt or node.domain != "com.microsoft"):
        graph.add(
            "graph.domain",
            node,
            f"target {target.name!r} has no operators of domain {node.domain!r}; "
            f"write {node.op_type} with operators of the default domain",
        )
        return None
    if node.domain == "com.microsoft":
        return None
    if tensorrt and node.op_type in UNSUPPORTED:
        instead = UNSUPPORTED[node.op_type]
        graph.add("operator.unsupported", node, f"TensorRT has no {node.op_type}; use {instead}")
        return None
    if tensorrt and node.op_type not in OPERATORS:
        near = difflib.get_close_matches(node.op_type, OPERATORS, n=1, cutoff=0.0)[0]
        graph.add(
            "operator.unknown",
            node,
            f"{node.op_type} is not in the table of TensorRT's operators; the nearest is {near}. "
            "If the parser documents it, add it to `engines.check.operators` with the source",
        )
        return None
    schema = schema_of(node, graph.opset)
    if schema is None:
        graph.add(
            "operator.opset",
            node,
            f"operator set {graph.opset} has no {node.op_type}; export at {target.opset} or write "
            "it with older operators",
        )
    return schema


def _check_equal_types(
    graph: CheckedGraph, node: "ir.Node", groups: "list[list[ir.Value]]"
) -> None:
    if node.op_type in _QUANTIZING:  # with rules of their own
        return
    for values in groups:
        found = [dtype_name(value) for value in values]
        if len(set(found) - {""}) > 1:
            graph.add(
                "operator.equal-types",
                node,
                f"inputs of {node.op_type} must have one element type, these have {found}: "
                f"{[value.name for value in values]}; insert a Cast",
            )


def _check_operator(
    graph: CheckedGraph, node: "ir.Node", operator: Operator, target: Target
) -> None:
    version = operator_version(target)
    if version < operator.since:
        graph.add(
            "operator.runtime-version",
            node,
            f"{operator.name} needs TensorRT {_text(operator.since)} ({operator.source}), target "
            f"{target.name!r} counts as {_text(version)}; use {OLDER[operator.name]}",
        )
        return
    value = node.inputs[operator.data] if len(node.inputs) > operator.data else None
    value = value or (node.outputs[0] if node.op_type == "Constant" else None)
    dtype = dtype_name(value)
    missing = missing_type(dtype, target) is not None
    missing |= dtype == "UINT8" and value not in graph.boundary
    if dtype and dtype not in operator.types and not missing:
        graph.add(
            "operator.type",
            node,
            f"TensorRT's {operator.name} takes {', '.join(operator.types)} ({operator.source}), "
            f"it gets {dtype}; insert a Cast",
        )
    for limit in operator.limits:
        broken = _broken(node, limit) if limit.holds(version) else None
        if broken is not None and missing_type(dtype_name(node.outputs[0]), target) is None:
            graph.add("operator.limit", node, f"{operator.name}: {broken} ({limit.source})")


def _broken(node: "ir.Node", limit: Limit) -> str | None:
    """Return how a node breaks a limit; None if it does not."""
    value = node.inputs[limit.index] if limit.index < len(node.inputs) else None
    if limit.kind == "one output":
        used = sum(bool(output.name) for output in node.outputs)
        return None if used == 1 else f"only the first output exists, the node has {used}"
    if limit.kind == "given or static":
        static = shape_of(node.inputs[0]) is not None
        known = value is not None or static
        return None if known else f"input {limit.index} must be given, sizes are not known"
    if limit.kind == "int64 or steps":
        given = len(node.inputs) > 4 or dtype_name(value) == "INT64"
        return None if given else f"input {limit.index} must be INT64, or steps must be given"
    if limit.kind == "attribute":
        return _broken_attribute(node, limit)
    if value is None:
        return None
    if limit.kind == "constant" and constant_root(value) is None:
        return f"input {limit.index} must be a constant, {value.name!r} is computed"
    if limit.kind == "floats" and dtype_name(value) in ("INT32", "INT64"):
        return f"input {limit.index} must be floating point, it is {dtype_name(value)}; cast it"
    rank = None if value.shape is None else len(value.shape)
    if limit.kind == "rank" and rank is not None and rank not in limit.values:
        return f"input {limit.index} must have rank {limit.values[0]}, it has {rank}; reshape it"
    return None


def check_products(graph: CheckedGraph, target: Target) -> None:
    """Check that matrix products with weights multiply in the target's compute type."""
    wanted = ONNX_COMPUTE[target.compute]
    for node in graph.nodes:
        index = WEIGHT_INPUT.get(node.op_type)
        weight = None if index is None or index >= len(node.inputs) else node.inputs[index]
        if weight is None or dtype_name(weight) in ("", wanted):
            continue
        producer = weight.producer()
        dequantized = producer is not None and producer.op_type == "DequantizeLinear"
        if constant_root(weight) is not None or dequantized:
            graph.add(
                "type.compute",
                node,
                f"{node.op_type} with weights multiplies in {dtype_name(weight)}, target "
                f"{target.name!r} is fast in {wanted}; convert the weights before export",
            )


def _broken_attribute(node: "ir.Node", limit: Limit) -> str | None:
    attribute = node.attributes.get(limit.name)
    if attribute is None:
        return None
    found = attribute.value
    if limit.name == "to":
        from onnx_ir import DataType

        found = DataType(found).name
    if found in limit.values:
        return None
    return f"attribute {limit.name!r} must be one of {list(limit.values)}, it is {found!r}"


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
