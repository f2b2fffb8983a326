"""Rules of quantized weights on ONNX Runtime."""

from engines.check.model import CheckedGraph, dtype_name
from engines.check.quantization_node import read_quantization
from engines.check.quantization_rules import check_scale
from qvla_export.shared.target import Target

_INT2_COLUMNS = 4


def check_ort(graph: CheckedGraph, target: Target) -> None:
    """Check every quantizing node of a graph for ONNX Runtime."""
    for node in graph.nodes:
        found = read_quantization(node)
        if found is None:
            continue
        check_scale(graph, found, whole_blocks=False)
        if found.root is None and found.zero_point is None:
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
        weight = found.root is not None and bool(found.products)
        scale = dtype_name(found.scale)
        if target.compute == "float32" and weight and scale != "FLOAT":
            graph.add(
                "ort.unfused-scale",
                node,
                f"the scale must be FLOAT where DequantizeLinear reads it, it is {scale}; "
                "put a Cast between a stored float16 scale and DequantizeLinear",
            )
