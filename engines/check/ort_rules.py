"""Rules of quantized weights on ONNX Runtime."""

from typing import TYPE_CHECKING

from engines.check.model import CheckedGraph, dtype_name, folded_from
from engines.check.quantization_node import read_quantization
from engines.check.quantization_rules import check_scale
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

_INT2_COLUMNS = 4
# Of a constant that scales are made of; others say which of them, and how many.
_SCALES, _MULTIPLIERS = ("FLOAT", "FLOAT16", "BFLOAT16"), "UINT8"


def check_ort(graph: CheckedGraph, target: Target) -> None:
    """Check every quantizing node of a graph for ONNX Runtime."""
    for node in graph.nodes:
        found = read_quantization(node)
        if found is None:
            continue
        check_scale(graph, found, _positive_roots(found.scale), whole_blocks=False)
        activations = folded_from(found.data) is None
        if activations and found.zero_point is None:
            graph.add(
                "ort.zero-point",
                node,
                "activations are not multiplied as integers without a zero point, "
                f"{node.op_type} has none; give it one of 0",
            )
        if (
            found.root is not None
            and found.bits == "INT2"
            and found.shape
            and found.shape[-1] % _INT2_COLUMNS
        ):
            graph.add(
                "ort.int2-columns",
                node,
                f"int2 weights need a multiple of {_INT2_COLUMNS} channels, their shape is "
                f"{list(found.shape)}; fill up with channels of zeros",
            )
        weight = not activations and bool(found.products)
        scale = dtype_name(found.scale)
        if target.compute == "float32" and weight and scale != "FLOAT":
            graph.add(
                "ort.unfused-scale",
                node,
                f"the scale must be FLOAT where DequantizeLinear reads it, it is {scale}; "
                "put a Cast between a stored float16 scale and DequantizeLinear",
            )


def _positive_roots(scale: "ir.Value") -> "list[ir.Value] | None":
    """Return the scales and multipliers a scale is computed from; None if it is no constant."""
    roots = folded_from(scale)
    if roots is None:
        return None
    return [root for root in roots if dtype_name(root) in (*_SCALES, _MULTIPLIERS)] or roots
