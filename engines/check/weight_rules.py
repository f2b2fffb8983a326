"""Rules of constant weights and the products that read them, on TensorRT."""

from typing import TYPE_CHECKING

import numpy as np

from engines.check.model import CheckedGraph, consumers
from engines.check.quantization_node import QuantizationNode, read_quantization, weight_axes
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

# What TensorRT moves Q/DQ across (TensorRT documentation, Explicit Quantization).
_COMMUTE = ("Reshape", "Transpose")
# Block sizes of NVIDIA's int4 matrix products.
_DOCUMENTED_BLOCKS = (64, 128)


def check_weight(graph: CheckedGraph, found: QuantizationNode, target: Target) -> None:
    """Check a DequantizeLinear of constant weights and the products that read it."""
    node, rank = found.node, len(found.shape or ())
    if found.granularity == "block" and found.bits == "INT8":
        graph.add(
            "quantization.int8-blocks",
            node,
            f"int8 has no blocks, this one has blocks of {found.block}; use one scale a channel",
            rtx_builds=found.axis in (rank - 1, rank - 2)
            and not any(map(_activation_type, found.products)),
        )
        return
    if found.granularity == "block" and found.axis not in (rank - 1, rank - 2):
        graph.add(
            "quantization.block-axis",
            node,
            f"blocks run along the last or second-to-last of {rank} dimensions, not along axis "
            f"{found.axis}; transpose the stored codes",
        )
        return
    if found.bits == "INT4" and _odd(found, target):
        graph.add(
            "quantization.even-int4",
            node,
            f"int4 weights need an even number of channels, their shape is "
            f"{list(found.shape or ())}; fill up with channels of zeros",
        )
    if not found.products:
        between = sorted({reader.op_type for reader, _ in consumers(node.outputs[0])})
        graph.add(
            "quantization.between",
            node,
            f"dequantized weights must be read by MatMul, Gemm or Conv themselves, these are read "
            f"by {between}; store the codes as the product wants them",
        )
        return
    _check_axis(graph, found, rank)
    if target.runtime == "tensorrt_rtx":
        _check_mixed(graph, found)
    _warn_of_kernels(graph, found)


def _odd(found: QuantizationNode, target: Target) -> bool:
    if not found.shape:
        return False
    even_rows = target.runtime == "tensorrt"
    return bool(found.shape[-1] % 2) and (even_rows or bool(np.prod(found.shape) % 2))


def _check_axis(graph: CheckedGraph, found: QuantizationNode, rank: int) -> None:
    if found.granularity == "tensor":
        return
    for product in found.products:
        channels, inputs = weight_axes(product, rank)
        wanted = inputs if found.granularity == "block" else channels
        if found.axis != wanted:
            graph.add(
                "quantization.channel-axis",
                found.node,
                f"scales of a {product.op_type} weight of rank {rank} run along axis {wanted} "
                f"({found.granularity}), not along axis {found.axis}",
            )
            return


def _warn_of_kernels(graph: CheckedGraph, found: QuantizationNode) -> None:
    node = found.node
    if found.bits == "INT4" and found.granularity != "block":
        graph.add(
            "quantization.int4-per-channel",
            node,
            "no document promises a kernel for int4 weights without blocks; "
            "use blocks of 128 along the input",
        )
    elif found.granularity == "block" and found.block not in _DOCUMENTED_BLOCKS:
        graph.add(
            "quantization.block-size",
            node,
            f"int4 kernels are known for blocks of {list(_DOCUMENTED_BLOCKS)}, this one has "
            f"{found.block}",
        )
    if found.bits == "INT8" and not all(map(_quantized_input, found.products)):
        graph.add(
            "quantization.int8-weight-only",
            node,
            "no document promises a kernel for int8 weights with float activations; quantize the "
            "activations as well, or compare the engine's bytes and time on the device",
        )


def _check_mixed(graph: CheckedGraph, found: QuantizationNode) -> None:
    """Check that a product's weights and activations are quantized alike."""
    for product in found.products:
        data = _activation_type(product)
        if data and not _multiplies(found, data, product):
            graph.add(
                "quantization.mixed-types",
                found.node,
                f"{product.op_type} multiplies {data} activations with {found.bits} weights (one "
                f"scale a {found.granularity}), for which there is no kernel; quantize both alike, "
                "or the weights alone",
                rtx_builds=(data, found.bits, found.granularity) == ("INT4", "INT8", "channel"),
            )
            return


def _multiplies(found: QuantizationNode, data: str, product: "ir.Node") -> bool:
    """Say whether TensorRT for RTX multiplies weights with activations of a type."""
    if found.bits != "INT4" or found.granularity == "tensor":
        return data == found.bits and found.granularity != "block"
    rank, scales = len(found.shape or ()), found.scale_shape or ()
    along_inputs = rank == 2 and found.axis == weight_axes(product, rank)[1]
    if found.granularity == "channel" or not along_inputs:
        return True  # the weights are unpacked first
    return data == "INT8" and scales[found.axis] == 1


def _activation_type(product: "ir.Node") -> str:
    """Return the type of activations with one scale a tensor; empty for all others."""
    producer = _quantized_input(product)
    found = None if producer is None else read_quantization(producer)
    if found is None or found.granularity != "tensor":
        return ""
    # UINT8 without a zero point is read as INT8, and refused with one.
    return "INT8" if found.bits == "UINT8" else found.bits


def _quantized_input(product: "ir.Node") -> "ir.Node | None":
    """Return the DequantizeLinear that a product's activations come from; None without one."""
    value = product.inputs[0]
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in _COMMUTE:
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    quantized = producer is not None and producer.op_type == "DequantizeLinear"
    return producer if quantized else None
