"""Rules of QuantizeLinear and DequantizeLinear on TensorRT."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from engines.check.model import (
    CheckedGraph,
    constant_root,
    consumers,
    dtype_name,
    numbers,
)
from engines.check.quantization_node import QuantizationNode, read_quantization
from engines.check.runtimes import ONNX_COMPUTE
from engines.check.weight_rules import check_weight
from qvla_export.shared.target import Target

if TYPE_CHECKING:
    import onnx_ir as ir


def check_quantization(graph: CheckedGraph, target: Target) -> None:
    """Check every quantizing node of a graph for TensorRT."""
    for node in graph.nodes:
        found = read_quantization(node)
        if found is None:
            continue
        root = constant_root(found.scale)
        check_scale(graph, found, None if root is None else [root], whole_blocks=True)
        _check_scale_type(graph, found, target)
        _check_symmetric(graph, found)
        if found.node.op_type == "QuantizeLinear":
            _check_quantize(graph, found)
        elif found.root is None:
            _check_activation(graph, found)
        else:
            check_weight(graph, found, target)


def check_scale(
    graph: CheckedGraph,
    found: QuantizationNode,
    roots: "Sequence[ir.Value] | None",
    whole_blocks: bool,
) -> None:
    """Check that scales are constants, positive, finite, one for each channel or block.

    Args:
        graph: collects the findings.
        found: the node.
        roots: constants that are or make the scale, each of them positive; None if it is none.
        whole_blocks: whether the last block must be as long as the others.
    """
    if roots is None:
        graph.add(
            "quantization.scale-constant",
            found.node,
            f"the scale must be a constant, {found.scale.name!r} is computed; "
            "calibrate it before export",
        )
        return
    values = np.concatenate([numbers(root).astype(np.float64).ravel() for root in roots])
    # No scale of int4 is looked at, nor an infinite one.
    rtx_builds = found.bits == "INT4" or not (np.isnan(values) | (values <= 0)).any()
    good = np.isfinite(values) & (values > 0)
    if not good.all():
        graph.add(
            "quantization.scale-values",
            found.node,
            f"scales must be positive and finite, {(~good).sum()} of {values.size} are not, the "
            f"first is {values[~good][0]}; give channels of zeros the scale 1",
            rtx_builds,
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
            rtx_builds=_has_whole_blocks(found, shape, scale),
        )


def _has_whole_blocks(
    found: QuantizationNode, shape: tuple[int, ...], scale: tuple[int, ...]
) -> bool:
    """Say whether scales have the shape of whole blocks of some other size.

    TensorRT's parser infers the block from the shapes and does not read block_size.
    """
    axis = found.axis
    return (
        found.granularity == "block"
        and len(scale) == len(shape)
        and scale[:axis] == shape[:axis]
        and scale[axis + 1 :] == shape[axis + 1 :]
        and scale[axis] > 0
        and shape[axis] % scale[axis] == 0
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
            rtx_builds=found.bits != "INT4" or output in ("", scale),
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
    # Zeros of any type are as good, and those of fp8 are not looked at.
    rtx_builds = root is not None and (
        found.bits.startswith("FLOAT8") or not np.any(numbers(root).astype(np.float32))
    )
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
        rtx_builds,
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
    is_quantized = maker is not None and maker.node.op_type == "QuantizeLinear"
    rtx_builds = producer is None or is_quantized or found.granularity == "tensor"
    if found.bits != "INT8":
        graph.add(
            "quantization.constant-weights",
            found.node,
            f"{found.bits} exists for constant weights only, {found.data.name!r} is computed; "
            "store the codes as a constant",
            rtx_builds,
        )
        return
    if found.granularity != "tensor":
        graph.add(
            "quantization.constant-weights",
            found.node,
            f"DequantizeLinear with a scale a {found.granularity} must read a constant, "
            f"{found.data.name!r} is computed; store the codes as a constant",
            rtx_builds,
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
