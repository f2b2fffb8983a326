"""A convolution as unfold + MatMul, so that its channels are in buckets like a linear map's.

A kernel that is its stride (patch embeddings) unfolds by a Transpose. Any other unfolds by one
strided Slice for each place of the kernel: plain operators, which every runtime has.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qvla_export.graph.buckets import BucketedWeight
from qvla_export.graph.buckets_to_onnx import BucketEmitter
from qvla_export.graph.float_graph import ExportError


@dataclass(frozen=True)
class _Convolution:
    """Sizes of a convolution, height before width."""

    channels: int
    image: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    # What is added above and on the left, then below and on the right.
    pads: tuple[int, int, int, int]

    @property
    def tiles(self) -> bool:
        """Whether every number of the input is read once."""
        whole = all(size % side == 0 for size, side in zip(self.image, self.kernel, strict=True))
        return self.strides == self.kernel and not any(self.pads) and whole

    @property
    def outputs(self) -> tuple[int, int]:
        """Return the height and width of the output."""
        high, wide = (
            (self.image[i] + self.pads[i] + self.pads[i + 2] - self.kernel[i]) // self.strides[i]
            + 1
            for i in range(2)
        )
        return high, wide


def emit_convolution(
    emitter: BucketEmitter, node: ir.Node, name: str, weight: BucketedWeight
) -> ir.Value:
    """Unfold [B, C, H, W] into windows [B, h * w, C * k * k], multiply, fold to [B, N, h, w].

    Args:
        emitter: records the nodes.
        node: the convolution.
        name: of the layer.
        weight: its buckets.

    Raises:
        ExportError: the image has no fixed size, or the convolution has groups or dilations.
    """
    tape, conv = emitter.tape, _sizes(node, name)
    high, wide = conv.outputs
    unfold = _tiles if conv.tiles else _windows
    (output,) = emitter.emit(name, unfold(emitter, node, name, conv), weight, [weight.channels])
    if len(node.inputs) > 2:
        output = tape.op("Add", [output, node.inputs[2]])
    rows = tape.op("Transpose", [output], {"perm": [0, 2, 1]})
    return tape.op(
        "Reshape", [rows, _whole(emitter, f"{name}.map", -1, weight.channels, high, wide)]
    )


def _tiles(emitter: BucketEmitter, node: ir.Node, name: str, conv: _Convolution) -> ir.Value:
    tape, (high, wide), (tall, broad) = emitter.tape, conv.outputs, conv.kernel
    grid = _whole(emitter, f"{name}.grid", -1, conv.channels, high, tall, wide, broad)
    split = tape.op("Reshape", [node.inputs[0], grid])
    moved = tape.op("Transpose", [split], {"perm": [0, 2, 4, 1, 3, 5]})
    flat = _whole(emitter, f"{name}.patches", -1, high * wide, conv.channels * tall * broad)
    return tape.op("Reshape", [moved, flat])


def _windows(emitter: BucketEmitter, node: ir.Node, name: str, conv: _Convolution) -> ir.Value:
    tape, (high, wide), (tall, broad) = emitter.tape, conv.outputs, conv.kernel
    image, rounding = _before_rounding(node)
    if any(conv.pads):
        top, left, bottom, right = conv.pads
        pads = _whole(emitter, f"{name}.border", 0, 0, top, left, 0, 0, bottom, right)
        image = tape.op("Pad", [image, pads])
    axes, steps = (
        _whole(emitter, f"{name}.axes", 2, 3),
        _whole(emitter, f"{name}.steps", *conv.strides),
    )
    places = []
    # A window's numbers lie as a kernel's: channel by channel, each row by row.
    single = _whole(emitter, f"{name}.place", -1, conv.channels, 1, high * wide)
    for row in range(tall):
        for column in range(broad):
            start = (row, column)
            stop = (
                row + (high - 1) * conv.strides[0] + 1,
                column + (wide - 1) * conv.strides[1] + 1,
            )
            limits = [
                _whole(emitter, f"{name}.{what}.{row}.{column}", *values)
                for what, values in (("start", start), ("stop", stop))
            ]
            seen = tape.op("Slice", [image, *limits, axes, steps])
            places.append(tape.op("Reshape", [seen, single]))
    stacked = places[0] if len(places) == 1 else tape.op("Concat", places, {"axis": 2})
    flat = _whole(emitter, f"{name}.windows", -1, conv.channels * tall * broad, high * wide)
    windows = tape.op("Transpose", [tape.op("Reshape", [stacked, flat])], {"perm": [0, 2, 1]})
    if rounding is None:
        return windows
    code_type = rounding.outputs[0].dtype
    codes = tape.op("QuantizeLinear", [windows, *rounding.inputs[1:]])
    assert code_type is not None
    codes.dtype = code_type
    return tape.op("DequantizeLinear", [codes, *rounding.inputs[1:]])


def _before_rounding(node: ir.Node) -> tuple[ir.Value | None, ir.Node | None]:
    """Return what a convolution's input was before it was rounded, and the QuantizeLinear.

    Windows are rounded themselves, so that nothing stands between the rounding and the product:
    runtimes look for integer products there, and ONNX Runtime 1.32 fails where it then finds 8-bit
    weights alone. Numbers are the same: each is rounded by itself, and 0 stays 0.
    """
    value = node.inputs[0]
    back = None if value is None else value.producer()
    if back is None or back.op_type != "DequantizeLinear" or back.inputs[0] is None:
        return value, None
    rounding = back.inputs[0].producer()
    if rounding is None or rounding.op_type != "QuantizeLinear":
        return value, None
    return rounding.inputs[0], rounding


def _whole(emitter: BucketEmitter, name: str, *numbers: int) -> ir.Value:
    return emitter.constant(name, np.array(numbers, np.int64))


def _sizes(node: ir.Node, name: str) -> _Convolution:
    image, kernel = node.inputs[0], node.inputs[1]
    assert image is not None and kernel is not None and kernel.shape is not None
    shape = image.shape
    height, width = shape[2:] if shape is not None else (None, None)
    if not isinstance(height, int) or not isinstance(width, int):
        raise ExportError(f"convolution {name} needs a static image size, got {shape}")
    _, channels, tall, broad = kernel.shape.numpy()
    plain = (
        node.attributes.get_int("group", 1) == 1
        and all(step == 1 for step in node.attributes.get_ints("dilations", [1]))
        and node.attributes.get_string("auto_pad", "NOTSET") in ("NOTSET", "VALID")
    )
    if not plain:
        raise ExportError(
            f"convolution {name} must have one group, no dilation and padding in numbers to become "
            f"a matrix product; got { {k: a.value for k, a in node.attributes.items()} }; leave it "
            "out of the plan"
        )
    strides = tuple(node.attributes.get_ints("strides", [1, 1]))
    pads = tuple(node.attributes.get_ints("pads", [0, 0, 0, 0]))
    return _Convolution(
        channels,
        (height, width),
        (tall, broad),
        (strides[0], strides[1]),
        (pads[0], pads[1], pads[2], pads[3]),
    )
