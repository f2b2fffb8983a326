"""Rules of a graph as a whole: operator set, IR version, and the element types of its tensors."""

from typing import TYPE_CHECKING

from engines.check.model import CheckedGraph, constant_root, consumers, dtype_name
from engines.check.runtimes import missing_type, reader
from engines.trt.modules import is_tensorrt
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

_FP8 = "FLOAT8E4M3FN"


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
        is_constant = constant_root(value) is value
        if reason is not None:
            graph.add(
                "type.missing",
                at,
                f"target {target.name!r} has no {dtype} tensors: {reason}; {value.name!r} is one",
                rtx_builds=dtype == "DOUBLE" or (dtype == _FP8 and is_constant),
            )
        elif is_tensorrt(target) and dtype == "UINT8" and value not in graph.boundary:
            graph.add(
                "type.uint8",
                at,
                f"UINT8 is for inputs and outputs of the graph, {value.name!r} is neither; "
                "use INT8 or INT32",
                rtx_builds=not _is_uint8_made(value),
            )


def _is_uint8_made(value: "ir.Value") -> bool:
    """Say whether a UINT8 value is computed by Cast, or dequantized from a constant."""
    producer = value.producer()
    if producer is not None:
        return producer.op_type == "Cast"
    return any(
        reader.op_type == "DequantizeLinear" and index == 0 for reader, index in consumers(value)
    )
