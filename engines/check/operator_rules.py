"""Rules of operators: that they exist on a target, with their types and limits."""

import difflib
from typing import TYPE_CHECKING

from engines.check.model import (
    CheckedGraph,
    constant_root,
    dtype_name,
    foreign_types,
    missing_inputs,
    numbers,
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
)
from engines.trt.modules import is_tensorrt
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# What TensorRT for RTX builds beyond the table of operators (1.7.1.116, measured 2026-11): element
# types by operator, and values of an attribute.
_INT8_OPERATORS = (
    "Abs",
    "Neg",
    "Sign",
    "Relu",
    "Identity",
    "Transpose",
    "Reshape",
    "Shape",
    "Cast",
)
_RTX_TYPES: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_INT8_OPERATORS, ("INT8",)),
    "Clip": ("INT8", "INT32", "INT64"),
}
_RTX_ATTRIBUTES: dict[str, tuple[str | int, ...]] = {
    "to": ("INT8",),
    "sorted": (0,),
    "mode": ("cubic",),
}
# Kinds of limits of operators that it has not.
_RTX_LIMITS = (("AveragePool", "rank"), ("MaxPool", "rank"))
_QUANTIZING = ("QuantizeLinear", "DequantizeLinear")


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
        if is_tensorrt(target) and node.op_type == "Attention":
            _check_attention(graph, node)
        typed = all(dtype_name(value) for value in node.inputs if value is not None)
        if typed and not any(dtype_name(value) for value in node.outputs):
            graph.add(
                "graph.untyped",
                node,
                f"ONNX infers no type for {node.outputs[0].name!r}; check the node's inputs",
            )


def _check_attention(graph: CheckedGraph, node: "ir.Node") -> None:
    """Refuse queries, keys and values that are not three or four dimensions alike (ONNX 23).

    TensorRT-RTX 1.7.1.116 refuses them too, but for scalars, which end its process (measured
    2026-11); of 38 operators with scalars for inputs no other one does.
    """
    ranks = [
        None if value is None or value.shape is None else len(value.shape)
        for value in node.inputs[:3]
    ]
    stated = {rank for rank in ranks if rank is not None}
    if stated - {3, 4} or len(stated) > 1:
        scalar = "; on a scalar TensorRT-RTX's parser crashes" if 0 in stated else ""
        graph.add(
            "operator.limit",
            node,
            "Attention takes queries, keys and values of 3 or of 4 dimensions, got "
            f"{ranks}{scalar}; reshape them to [batch, heads, tokens, size]",
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
            # It is taken for ONNX's operator of that name.
            rtx_builds=node.op_type in OPERATORS,
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
            rtx_builds=dtype in _RTX_TYPES.get(operator.name, ()),
        )
    for limit in operator.limits:
        broken = _broken(node, limit) if limit.holds(version) else None
        if broken is not None and missing_type(dtype_name(node.outputs[0]), target) is None:
            graph.add(
                "operator.limit",
                node,
                f"{operator.name}: {broken} ({limit.source})",
                rtx_builds=(operator.name, limit.kind) in _RTX_LIMITS
                or _attribute_value(node, limit) in _RTX_ATTRIBUTES.get(limit.name, ()),
            )


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
    if limit.kind == "ones":
        stated = node.attributes.get(limit.name)
        ones = stated is None or set(stated.as_ints()) <= {1}
        return None if ones else f"all of attribute {limit.name!r} must be 1"
    if value is None:
        return None
    if limit.kind in ("constant", "false") and constant_root(value) is None:
        return f"input {limit.index} must be a constant, {value.name!r} is computed"
    if limit.kind == "false" and _is_true(value):
        return f"input {limit.index} must be false, {value.name!r} is true; export in eval mode"
    if limit.kind == "floats" and dtype_name(value) in ("INT32", "INT64"):
        return f"input {limit.index} must be floating point, it is {dtype_name(value)}; cast it"
    rank = None if value.shape is None else len(value.shape)
    if limit.kind == "rank" and rank is not None and rank not in limit.values:
        ranks = " or ".join(map(str, limit.values))
        return f"input {limit.index} must have rank {ranks}, it has {rank}; reshape it"
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


def _attribute_value(node: "ir.Node", limit: Limit) -> str | int | None:
    """Return an attribute's value, an element type by name; None where it is not stated."""
    attribute = node.attributes.get(limit.name)
    if attribute is None:
        return None
    if limit.name == "to":
        from onnx_ir import DataType

        return DataType(attribute.as_int()).name
    value: str | int = attribute.value
    return value


def _broken_attribute(node: "ir.Node", limit: Limit) -> str | None:
    found = _attribute_value(node, limit)
    if found is None or found in limit.values:
        return None
    return f"attribute {limit.name!r} must be one of {list(limit.values)}, it is {found!r}"


def _is_true(value: "ir.Value") -> bool:
    root = constant_root(value)
    return root is not None and bool(numbers(root).any())


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
