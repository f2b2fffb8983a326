"""Rules of QuantizeLinear and DequantizeLinear on TensorRT."""

from typing import TYPE_CHECKING

import numpy as np

from engines.check.model import (
    CheckedGraph,
    constant_root,
    consumers,
    dtype_name,
    numbers,
)
from engines.check.quantization_node import QuantizationNode, read_quantization, weight_axes
from engines.check.runtimes import ONNX_COMPUTE
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir

# What TensorRT moves Q/DQ across (TensorRT documentation, Explicit Quantization).
_COMMUTE = ("Reshape", "Transpose")
# Block sizes of NVIDIA's int4 matrix products.
_DOCUMENTED_BLOCKS = (64, 128)


def check_quantization(graph: CheckedGraph, target: Target) -> None:
    """Check every quantizing node of a graph for TensorRT."""
    for node in graph.nodes:
        found = read_quantization(node)
        if found is None:
            continue
        check_scale(graph, found, whole_blocks=True)
        _check_scale_type(graph, found, target)
        _check_symmetric(graph, found)
        if found.node.op_type == "QuantizeLinear":
            _check_quantize(graph, found)
        elif found.root is None:
            _check_activation(graph, found)
        else:
            _check_weight(graph, found, target)


def check_scale(graph: CheckedGraph, found: QuantizationNode, whole_blocks: bool) -> None:
    """Check that scales are constants, positive, finite, one for each channel or block.

    Args:
        graph: collects the findings.
        found: the node.
        whole_blocks: whether the last block must be as long as the others.
    """
    root = constant_root(found.scale)
    if root is None:
        graph.add(
            "quantization.scale-constant",
            found.node,
            f"the scale must be a constant, {found.scale.name!r} is computed; "
            "calibrate it before export",
        )
        return
    values = numbers(root).astype(np.float64)
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        graph.add(
            "quantization.scale-values",
            found.node,
            f"scales must be positive and finite, {(~good).sum()} of {values.size} are not, the "
            f"first is {values[~good][0]}; give channels of zeros the scale 1",
        )
    shape, scale, axis = found.shape, found.scale_shape, found.axis
    if found.granularity == "tensor" or shape is None or scale is None or axis >= len(shape):
        return
    rest = shape[axis] % found.block if found.block else 0
    wanted = _scale_shape(found, shape)
    if scale != wanted or (whole_blocks and rest):
        graph.add(
            "quantization.scale-shape",
            found.node,
            f"scales of {list(shape)} along axis {axis} ({found.granularity} of "
            f"{found.block or 1}) must have shape {list(wanted)}, they have {list(scale)}"
            + (f", and {rest} inputs are left over; fill them up with zeros" if rest else ""),
        )


def _scale_shape(found: QuantizationNode, shape: tuple[int, ...]) -> tuple[int, ...]:
    if found.granularity == "channel":
        return (shape[found.axis],)
    blocks = -(-shape[found.axis] // max(found.block, 1))
    return (*shape[: found.axis], blocks, *shape[found.axis + 1 :])


def _check_scale_type(graph: CheckedGraph, found: QuantizationNode, target: Target) -> None:
    node, scale = found.node, dtype_name(found.scale)
    wanted = ONNX_COMPUTE[target.compute]
    output = dtype_name(node.outputs[0])
    if node.op_type == "DequantizeLinear" and (scale != wanted or output not in ("", scale)):
        graph.add(
            "quantization.scale-type",
            node,
            f"scale and output must have the compute type {wanted}, they are {scale} and "
            f"{output}; convert the scale and leave output_dtype out",
        )
    data = dtype_name(found.data)
    if node.op_type == "QuantizeLinear" and scale != data:
        graph.add(
            "quantization.input-type",
            node,
            f"the scale must have the type of the input, they are {scale} and {data}; "
            "convert the scale",
        )


def _check_symmetric(graph: CheckedGraph, found: QuantizationNode) -> None:
    if found.zero_point is None:
        return
    root = constant_root(found.zero_point)
    name = found.zero_point.name
    if root is None:
        problem = f"{name!r} is computed"
    elif dtype_name(found.zero_point) != found.bits:
        problem = f"it is {dtype_name(found.zero_point)} for {found.bits}"
    elif np.any(numbers(root).astype(np.int32)):
        problem = f"the largest is {np.abs(numbers(root).astype(np.int32)).max()}"
    else:
        return
    graph.add(
        "quantization.symmetric",
        found.node,
        f"a zero point must be a constant of zeros of the quantized type, {problem}; "
        "quantize symmetrically and leave it out",
    )


def _check_quantize(graph: CheckedGraph, found: QuantizationNode) -> None:
    node = found.node
    if found.bits == "UINT8":
        graph.add(
            "quantization.output-type",
            node,
            "QuantizeLinear without a zero point makes UINT8 in ONNX and INT8 in TensorRT; "
            "give it an INT8 zero point of 0 or output_dtype",
        )
    if found.granularity != "tensor":
        graph.add(
            "quantization.per-tensor-activations",
            node,
            f"activations have one scale a tensor, this one has {found.scale_shape}; "
            "store weights as codes, and give activations one scale",
        )
    readers = [reader.op_type for reader, _ in consumers(node.outputs[0])]
    if set(readers) != {"DequantizeLinear"} or node.outputs[0] in graph.boundary:
        graph.add(
            "quantization.pairs",
            node,
            f"QuantizeLinear must be read by DequantizeLinear alone, it is read by "
            f"{readers or 'nothing'}"
            f"{' and is an output of the graph' if node.outputs[0] in graph.boundary else ''}",
        )


def _check_activation(graph: CheckedGraph, found: QuantizationNode) -> None:
    producer = found.data.producer()
    maker = None if producer is None else read_quantization(producer)
    if maker is not None and (maker.bits == "UINT8" or maker.granularity != "tensor"):
        return  # reported there
    if found.bits != "INT8":
        graph.add(
            "quantization.constant-weights",
            found.node,
            f"{found.bits} exists for constant weights only, {found.data.name!r} is computed; "
            "store the codes as a constant",
        )
        return
    if found.granularity != "tensor":
        graph.add(
            "quantization.constant-weights",
            found.node,
            f"DequantizeLinear with a scale a {found.granularity} must read a constant, "
            f"{found.data.name!r} is computed; store the codes as a constant",
        )
        return
    if maker is None or maker.node.op_type != "QuantizeLinear":
        made = "an input of the graph" if producer is None else producer.op_type
        graph.add(
            "quantization.pairs",
            found.node,
            f"DequantizeLinear of activations must read a QuantizeLinear, it reads {made}",
        )
        return
    roots = constant_root(found.scale), constant_root(maker.scale)
    if None not in roots and not _equal(*roots):
        graph.add(
            "quantization.pairs",
            found.node,
            "QuantizeLinear and DequantizeLinear of a pair must have the same scale; share one",
        )


def _equal(first: "ir.Value | None", second: "ir.Value | None") -> bool:
    assert first is not None and second is not None
    return first is second or bool(np.array_equal(numbers(first).ravel(), numbers(second).ravel()))


def _check_weight(graph: CheckedGraph, found: QuantizationNode, target: Target) -> None:
    node, rank = found.node, len(found.shape or ())
    if found.granularity == "block" and found.bits == "INT8":
        graph.add(
            "quantization.int8-blocks",
            node,
            f"int8 has no blocks, this one has blocks of {found.block}; use one scale a channel",
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
    if found.bits == "INT8" and not all(_quantized_input(product) for product in found.products):
        graph.add(
            "quantization.int8-weight-only",
            node,
            "no document promises a kernel for int8 weights with float activations; quantize the "
            "activations as well, or compare the engine's bytes and time on the device",
        )


def _quantized_input(product: "ir.Node") -> bool:
    value = product.inputs[0]
    producer = None if value is None else value.producer()
    while producer is not None and producer.op_type in _COMMUTE:
        value = producer.inputs[0]
        producer = None if value is None else value.producer()
    return producer is not None and producer.op_type == "DequantizeLinear"
