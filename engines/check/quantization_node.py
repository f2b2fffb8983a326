"""One QuantizeLinear or DequantizeLinear node as the rules see it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from engines.check.model import constant_root, consumers, dtype_name, shape_of

if TYPE_CHECKING:
    import onnx_ir as ir

# Matrix products with weights -> index of the weight among the inputs.
WEIGHT_INPUT = {"MatMul": 1, "Gemm": 1, "Conv": 1, "ConvTranspose": 1}


@dataclass(frozen=True)
class QuantizationNode:
    """Inputs, granularity and axis of a QuantizeLinear or DequantizeLinear."""

    node: "ir.Node"
    data: "ir.Value"
    scale: "ir.Value"
    zero_point: "ir.Value | None"
    # Sizes of the data and of the scale; None if one is not known.
    shape: tuple[int, ...] | None
    scale_shape: tuple[int, ...] | None
    # One scale; one a channel along `axis`; one a block along `axis`.
    granularity: Literal["tensor", "channel", "block"]
    # Not negative if the rank is known.
    axis: int
    # Weights that share a scale; 0 unless in blocks.
    block: int
    # The constant that the data is; None for activations.
    root: "ir.Value | None"

    @property
    def bits(self) -> str:
        """Element type of the quantized side: "INT8", "INT4", "INT2"."""
        dequantizes = self.node.op_type == "DequantizeLinear"
        return dtype_name(self.data if dequantizes else self.node.outputs[0])

    @property
    def products(self) -> "list[ir.Node]":
        """Matrix products that read the output as their weight."""
        return [
            node
            for node, index in consumers(self.node.outputs[0])
            if WEIGHT_INPUT.get(node.op_type) == index
        ]


def read_quantization(node: "ir.Node") -> QuantizationNode | None:
    """Return what the rules ask of a node; None if it quantizes nothing or lacks an input."""
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 2:
        return None
    data, scale = node.inputs[0], node.inputs[1]
    if data is None or scale is None:
        return None
    shape, scale_shape = shape_of(data), shape_of(scale)
    block = node.attributes.get_int("block_size", 0)
    scales = 1 if scale_shape is None else _volume(scale_shape)
    granularity: Literal["tensor", "channel", "block"] = "tensor"
    if block or (scales > 1 and scale_shape is not None and len(scale_shape) > 1):
        granularity = "block"
    elif scales > 1:
        granularity = "channel"
    axis = node.attributes.get_int("axis", 1)
    rank = None if data.shape is None else len(data.shape)
    return QuantizationNode(
        node=node,
        data=data,
        scale=scale,
        zero_point=node.inputs[2] if len(node.inputs) > 2 else None,
        shape=shape,
        scale_shape=scale_shape,
        granularity=granularity,
        axis=axis + rank if axis < 0 and rank is not None else axis,
        block=block,
        root=constant_root(data) if node.op_type == "DequantizeLinear" else None,
    )


def weight_axes(product: "ir.Node", rank: int) -> tuple[int, int]:
    """Return a product's weight axes: output channels, and inputs that blocks run along."""
    if product.op_type == "MatMul":
        return rank - 1, rank - 2
    if product.op_type == "Gemm":
        return (0, 1) if product.attributes.get_int("transB", 0) else (1, 0)
    return (0, 1) if product.op_type == "Conv" else (1, 0)


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume
