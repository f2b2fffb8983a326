"""The operators of ONNX that our bundles hold, in torch. ONNX operator set 25.

Each takes a node's attributes and its inputs, None where one is left out. Whole numbers that say a
shape, an axis or a place stay on the CPU, so that no step waits for a GPU.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engines.base import EngineError
from engines.torch.shape_operators import (
    Attributes,
    cut,
    expand,
    from_last,
    gather,
    gather_nd,
    numbers,
    pad,
    reshape,
    shape_of,
    split,
    squeeze,
    unsqueeze,
)

Operator = Callable[..., Any]

# ONNX's element types.
TYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def cast(attributes: Attributes, values: Tensor) -> Tensor:
    """Convert to another type; see `TYPES`."""
    if attributes["to"] not in TYPES:
        raise EngineError(f"Cast to ONNX type {attributes['to']} is none that a bundle holds")
    return values.to(TYPES[attributes["to"]])


def clip(_: Attributes, values: Tensor, low: Tensor | None, high: Tensor | None = None) -> Tensor:
    """Limit to a range."""
    values = values if low is None else torch.maximum(values, low.to(values.device))
    return values if high is None else torch.minimum(values, high.to(values.device))


def concat(attributes: Attributes, *parts: Tensor) -> Tensor:
    """Join along an axis."""
    return torch.cat(parts, dim=attributes["axis"])


def gemm(attributes: Attributes, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    """Multiply matrices, scaled, and add."""
    a = a.T if attributes.get("transA") else a
    b = b.T if attributes.get("transB") else b
    product = a @ b
    alpha, beta = attributes.get("alpha", 1.0), attributes.get("beta", 1.0)
    product = product if alpha == 1 else product * alpha
    if c is None:
        return product
    return product + (c if beta == 1 else c * beta)


def layer_norm(
    attributes: Attributes, values: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Normalize the axes from one on, in float32."""
    shape = values.shape[attributes.get("axis", -1) :]
    moved = None if bias is None else bias.float()
    epsilon = attributes.get("epsilon", 1e-5)
    normal = functional.layer_norm(values.float(), shape, scale.float(), moved, epsilon)
    return normal.to(values.dtype)


def convolution(
    attributes: Attributes, values: Tensor, weights: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Convolve with explicit zeros around."""
    rank = values.dim() - 2
    begins, ends = _around(attributes, rank)
    filled = functional.pad(values, from_last(begins, ends)) if any(begins + ends) else values
    convolve = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[rank]
    strides = attributes.get("strides", [1] * rank)
    dilations = attributes.get("dilations", [1] * rank)
    return convolve(filled, weights, bias, strides, 0, dilations, attributes.get("group", 1))


def max_pool(attributes: Attributes, values: Tensor) -> Tensor:
    """Take the largest of each window; around the values is minus infinity."""
    if attributes.get("ceil_mode", 0) or values.dim() != 4:
        raise EngineError("MaxPool of a bundle has two axes and whole windows")
    begins, ends = _around(attributes, 2)
    filled = functional.pad(values, from_last(begins, ends), value=-math.inf)
    size, strides = attributes["kernel_shape"], attributes.get("strides", [1, 1])
    return functional.max_pool2d(filled, size, strides, 0, attributes.get("dilations", [1, 1]))


def _around(attributes: Attributes, rank: int) -> tuple[list[int], list[int]]:
    if attributes.get("auto_pad", "NOTSET") != "NOTSET":
        raise EngineError(f"auto_pad must be NOTSET, got {attributes['auto_pad']}")
    pads = list(attributes.get("pads", [0] * 2 * rank))
    return pads[:rank], pads[rank:]


def reduced(reduce: Operator) -> Operator:
    """Return an operator that reduces axes."""

    def operate(attributes: Attributes, values: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = list(range(values.dim())) if axes is None else numbers(axes)
        if not chosen and attributes.get("noop_with_empty_axes", 0):
            return values
        kept: Tensor = reduce(values, chosen, bool(attributes.get("keepdims", 1)))
        return kept

    return operate


def dequantize(
    attributes: Attributes, codes: Tensor, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    """Return codes, less their zero points, times their scales."""
    wide = (
        codes.to(torch.int32)
        if zero is None
        else codes.to(torch.int32) - _spread(attributes, zero.to(torch.int32), codes)
    )
    return wide.to(scale.dtype) * _spread(attributes, scale, codes)


def quantize(
    attributes: Attributes, values: Tensor, scale: Tensor, zero: Tensor | None = None
) -> Tensor:
    """Return the nearest codes, halves to even, within the codes' range."""
    named = attributes.get("output_dtype", 0)
    kind = zero.dtype if zero is not None else TYPES.get(named or 2)
    if kind not in (torch.int8, torch.uint8):
        raise EngineError(f"QuantizeLinear of a bundle gives int8 or uint8, got {kind or named}")
    codes = torch.round(values.float() / _spread(attributes, scale.float(), values))
    if zero is not None:
        codes = codes + _spread(attributes, zero.float(), values)
    limits = torch.iinfo(kind)
    return codes.clamp(limits.min, limits.max).to(kind)


def _spread(attributes: Attributes, steps: Tensor, values: Tensor) -> Tensor:
    """Return scales or zero points beside each number of a tensor: blocks, an axis, or one."""
    axis = attributes.get("axis", 1)
    size = attributes.get("block_size", 0)
    if size:
        whole = steps.repeat_interleave(size, dim=axis)
        return whole.narrow(axis, 0, values.shape[axis])
    if steps.dim() == 0 or steps.numel() == 1:
        return steps.reshape(())
    shape = [1] * values.dim()
    shape[axis] = -1
    return steps.reshape(shape)


def argmax(attributes: Attributes, values: Tensor) -> Tensor:
    """Return the first place of the largest."""
    if attributes.get("select_last_index", 0):
        raise EngineError("ArgMax of a bundle picks the first of equal numbers")
    return values.argmax(attributes.get("axis", 0), bool(attributes.get("keepdims", 1)))


def elementwise(operate: Operator) -> Operator:
    """Return an operator without attributes."""

    def call(_: Attributes, *values: Tensor) -> Tensor:
        found: Tensor = operate(*values)
        return found

    return call


def divide(_: Attributes, a: Tensor, b: Tensor) -> Tensor:
    """Divide; whole numbers towards zero."""
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


# Of a bundle's graphs, and no others: see `require_operators`.
OPERATORS: Mapping[str, Operator] = {
    "Abs": elementwise(torch.abs),
    "Add": elementwise(torch.add),
    "ArgMax": argmax,
    "Cast": cast,
    "Clip": clip,
    "Concat": concat,
    "Conv": convolution,
    "Cos": elementwise(torch.cos),
    "DequantizeLinear": dequantize,
    "Div": divide,
    "Equal": elementwise(torch.eq),
    "Expand": expand,
    "Gather": gather,
    "GatherND": gather_nd,
    "Gelu": lambda a, x: functional.gelu(x, approximate=a.get("approximate", "none")),
    "Gemm": gemm,
    "Greater": elementwise(torch.gt),
    "LayerNormalization": layer_norm,
    "Less": elementwise(torch.lt),
    "LessOrEqual": elementwise(torch.le),
    "MatMul": elementwise(torch.matmul),
    "Max": elementwise(torch.maximum),
    "MaxPool": max_pool,
    "Mul": elementwise(torch.mul),
    "Neg": elementwise(torch.neg),
    "Not": elementwise(torch.logical_not),
    "Or": elementwise(torch.logical_or),
    "Pad": pad,
    "Pow": elementwise(lambda a, b: torch.pow(a, b.to(a.dtype))),
    "QuantizeLinear": quantize,
    "Range": elementwise(lambda a, b, c: torch.arange(a.item(), b.item(), c.item(), dtype=a.dtype)),
    "Reciprocal": elementwise(torch.reciprocal),
    "ReduceL2": reduced(lambda x, axes, kept: torch.linalg.vector_norm(x, 2, axes, kept)),
    "ReduceMax": reduced(lambda x, axes, kept: x.amax(axes, kept)),
    "ReduceMean": reduced(lambda x, axes, kept: x.mean(axes, kept)),
    "ReduceSum": reduced(lambda x, axes, kept: x.sum(axes, kept)),
    "Relu": elementwise(torch.relu),
    "Reshape": reshape,
    "Shape": shape_of,
    "Sigmoid": elementwise(torch.sigmoid),
    "Sin": elementwise(torch.sin),
    "Slice": cut,
    "Softmax": lambda a, x: torch.softmax(x, a.get("axis", -1)),
    "Split": split,
    "Sqrt": elementwise(torch.sqrt),
    "Squeeze": squeeze,
    "Sub": elementwise(torch.sub),
    "Tanh": elementwise(torch.tanh),
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": unsqueeze,
    "Where": elementwise(torch.where),
}
