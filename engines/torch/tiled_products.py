"""A graph's products with quantized weights, as launches of the kernel: one for each input."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engines.kernels.narrowed import narrowed
from engines.kernels.tile_layout import WidthCodes, lay_out
from engines.kernels.tiled_layer import TiledLayer
from engines.torch.constants import TILED, ConstantValues, Operation
from engines.torch.rounded_inputs import symmetric_step


@dataclass(frozen=True)
class _Weight:
    """A product's weights, as tiles take them."""

    node: Operation
    widths: tuple[WidthCodes, ...]
    channels: int
    # Added to the product where it is read by this alone.
    bias: "_Bias | None" = None

    @property
    def output(self) -> str:
        """Name of what a launch gives."""
        return self.node.outputs[0] if self.bias is None else self.bias.node.outputs[0]


@dataclass(frozen=True)
class _Bias:
    """An Add of a constant, one number a channel."""

    node: Operation
    numbers: NDArray[np.float32]
    # Dimensions of the constant: what it is added to has as many.
    rank: int


def tiled_products(
    nodes: Sequence[Operation],
    outputs: Sequence[str],
    values: ConstantValues,
    device: torch.device,
) -> list[Operation]:
    """Return a graph's nodes with its products of quantized weights in tiles.

    Products that read the same value are one launch, whatever their widths, with the biases that
    are added next; what puts their outputs in order stays as it is. Rounded inputs go in as int8
    numbers, halves as they are; products of float32 rows stay, as halves would move actions.

    Args:
        nodes: in order.
        outputs: of the graph.
        values: what constants decide.
        device: where it runs.
    """
    producers = {name: node for node in nodes for name in node.outputs}
    users: dict[str, list[Operation]] = {}
    for node in nodes:
        for name in node.inputs:
            users.setdefault(name, []).append(node)
    launches: dict[str, Operation] = {}
    for name, readers in users.items():
        products = [
            node
            for node in readers
            if node.operator == "MatMul" and node.inputs[0] == name and values.known(node.inputs[1])
        ]
        source, scale = _rows(name, producers, values)
        weights = [
            _weight(node, producers, values, integers=scale is not None) for node in products
        ]
        if scale is not None and None in weights:
            # Factors in halves: of whole-number rows their halves are multiplied.
            source, scale = name, None
            weights = [_weight(node, producers, values, integers=False) for node in products]
        found = [weight for weight in weights if weight is not None]
        if any(width.bits < 16 for weight in found for width in weight.widths):
            for place, weight in enumerate(found):
                readers = users.get(weight.node.outputs[0], [])
                if weight.node.outputs[0] not in outputs and len(readers) == 1:
                    found[place] = replace(weight, bias=_bias(weight, readers[0], values))
            launch = _launch(found, source, scale, device)
            launches |= {
                name: launch for one in found for name in (one.node.outputs[0], one.output)
            }
    left, done = [], set()
    for node in nodes:
        launch_of = launches.get(node.outputs[0])
        if launch_of is None:
            left.append(node)
        elif launch_of.outputs not in done:
            done.add(launch_of.outputs)
            left.append(launch_of)
    return left


def run_tiled(attributes: Mapping[str, Any], values: Tensor) -> tuple[Tensor, ...]:
    """Multiply by all layers of a launch; their outputs are side by side in memory."""
    layer: TiledLayer = attributes["layer"]
    flat = values.reshape(-1, layer.inputs).contiguous()
    if flat.dtype == torch.uint8:  # its middle, 128, is 0
        flat = (flat ^ 128).view(torch.int8)
    out = layer(flat, attributes["scale"], attributes["dtype"])
    ones = [1] * (attributes["rank"] - values.dim())
    shaped = out.reshape(*ones, *values.shape[:-1], layer.channels)
    return torch.split(shaped, attributes["sizes"], dim=-1)


def _launch(
    weights: Sequence[_Weight], source: str, scale: Tensor | None, device: torch.device
) -> Operation:
    """Return the node that computes several products of one input."""
    inputs = next(w.codes.shape[1] for weight in weights for w in weight.widths)
    places = np.cumsum([0, *(weight.channels for weight in weights)])
    by_bits: dict[int, list[WidthCodes]] = {}
    for weight, start in zip(weights, places, strict=False):
        for width in weight.widths:
            moved = replace(width, channels=width.channels + start)
            by_bits.setdefault(width.bits, []).append(moved)
    none = np.zeros(0, np.float32)
    biases = [np.zeros(w.channels) if w.bias is None else w.bias.numbers for w in weights]
    shape, bias = (int(places[-1]), inputs), np.concatenate([none, *biases]).astype(np.float32)
    layout = lay_out([_joined(widths) for widths in by_bits.values()], shape, bias)
    attributes = {
        "layer": TiledLayer(layout, device),
        "scale": None if scale is None else scale.reshape(1).float().to(device),
        "dtype": torch.float32
        if scale is not None and scale.dtype == torch.float32
        else torch.float16,
        "sizes": [weight.channels for weight in weights],
        "rank": max(0 if weight.bias is None else weight.bias.rank for weight in weights),
    }
    outputs = tuple(weight.output for weight in weights)
    return Operation(TILED, attributes, (source,), outputs)


def _bias(weight: _Weight, reader: Operation, values: ConstantValues) -> _Bias | None:
    """Return what the only reader of a product adds to its channels; None for anything else."""
    others = [name for name in reader.inputs if name != weight.node.outputs[0]]
    if reader.operator != "Add" or len(others) != 1 or not values.known(others[0]):
        return None
    added = values.of(others[0])
    if added.dim() < 1 or not added.shape[-1] == added.numel() == weight.channels:
        return None
    return _Bias(reader, added.reshape(-1).float().numpy(), added.dim())


def _joined(widths: Sequence[WidthCodes]) -> WidthCodes:
    factors = [width.factors for width in widths if width.factors is not None]
    return WidthCodes(
        widths[0].bits,
        np.concatenate([width.channels for width in widths]),
        np.concatenate([width.codes for width in widths]),
        np.concatenate([width.scales for width in widths]),
        np.concatenate(factors) if factors else None,
    )


def _rows(
    name: str, producers: Mapping[str, Operation], values: ConstantValues
) -> tuple[str, Tensor | None]:
    """Return what a launch reads, and the step of rounded inputs; None where they are not."""
    unrounded = producers.get(name)
    if unrounded is not None and unrounded.operator == "DequantizeLinear":
        codes = unrounded.inputs[0]
        step = None if values.known(codes) else symmetric_step(unrounded, values)
        if step is not None:
            return codes, step
    return name, None


def _weight(
    node: Operation, producers: Mapping[str, Operation], values: ConstantValues, integers: bool
) -> _Weight | None:
    """Return a product's weights in widths; None where tiles do not hold them exactly."""
    name = node.inputs[1]
    producer = producers.get(name)
    if producer is not None and producer.operator == "DequantizeLinear":
        widths = _quantized(producer, producers, values, integers)
    else:
        widths = _halves(values.of(name))
    if widths is None or not widths or (not integers and not _in_halves(node, producers, values)):
        return None
    return _Weight(node, tuple(widths), int(values.shape(name)[1]))


def _quantized(
    node: Operation, producers: Mapping[str, Operation], values: ConstantValues, integers: bool
) -> list[WidthCodes] | None:
    codes, scale = values.of(node.inputs[0]), values.of(node.inputs[1])
    zero = values.of(node.inputs[2]) if len(node.inputs) > 2 else torch.zeros(1)
    if codes.dtype != torch.int8 or codes.dim() != 2 or bool(zero.any()):
        return None
    rows = np.ascontiguousarray(codes.numpy().T)
    size = node.attributes.get("block_size", 0)
    if not size:
        scales = scale.float().reshape(-1).expand(len(rows)).numpy()
        if integers:
            return narrowed(rows, scales)
        # Not narrowed: beside them may be factors in halves, and a layer has one kind.
        return [WidthCodes(8, np.arange(len(rows)), rows, scales)]
    if size not in (64, 128) or node.attributes.get("axis", 1) != 0:
        return None
    levels = producers.get(node.inputs[1])
    if levels is not None and levels.operator == "Mul":
        one, many = (values.of(name) for name in levels.inputs)
        spread = np.repeat(many.numpy().astype(np.int16), size, axis=0)[: codes.shape[0]].T
        return narrowed((rows * spread).astype(np.int8), one.float().reshape(-1).numpy())
    if integers or scale.dtype != torch.float16:
        return None
    bits = 2 if int(rows.min()) >= -2 and int(rows.max()) < 2 else 4
    ones = np.ones(len(rows), np.float32)
    return [WidthCodes(bits, np.arange(len(rows)), rows, ones, scale.numpy().T)]


def _halves(weights: Tensor) -> list[WidthCodes] | None:
    """Return weights of 16 bits; None where halves do not hold them."""
    if weights.dim() != 2 or not weights.is_floating_point():
        return None
    halves = weights.half()
    if not torch.equal(halves.to(weights.dtype), weights):
        return None
    rows: NDArray[np.float16] = np.ascontiguousarray(halves.numpy().T)
    return [WidthCodes(16, np.arange(len(rows)), rows, np.ones(len(rows), np.float32))]


def _in_halves(node: Operation, producers: Mapping[str, Operation], values: ConstantValues) -> bool:
    """Say whether a product's rows are float16: its weights are of the same type."""
    return values.kind(node.inputs[1]) == torch.float16
