"""A policy's quantizable layers: their shapes, weights as rows, and temporary replacement."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.policies.base import Policy
from qvla_export.quantizer.activations import SMALLEST_TOKEN, ActivationRanges
from qvla_export.quantizer.coupling import fake_quantize_coupled
from qvla_export.quantizer.plan import BitPlan
from qvla_export.quantizer.quantize import QuantizerSpec, as_rows, fake_quantize, quantize_channels
from qvla_export.quantizer.round_plan import require_rounded
from qvla_export.quantizer.scale_search import Steps

# A layer that can be quantized; layers by name, in forward order.
Layer = nn.Linear | nn.Conv2d
Layers = Mapping[str, Layer]
# Weights that are rounded at once, and what each takes on its way: codes, scales, products.
_ROUNDED_WEIGHTS = 1 << 19
_BYTES_PER_ROUNDED = 32


def traced_layers(policy: Policy) -> dict[str, Layer]:
    """Return the policy's quantizable layers, in forward order; also where gradients are off."""
    with torch.enable_grad():
        return dict(policy.layers())


def weights_on_disk(policy: Policy) -> bool:
    """Say whether a policy's weights were left on disk."""
    return next(policy.module.parameters()).is_meta


def layer_shapes(layers: Layers) -> dict[str, tuple[int, int]]:
    """Return (channels, weights of one channel) of each layer."""
    return {
        name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in layers.items()
    }


def weight_rows(layer: Layer, channels: slice = slice(None)) -> NDArray[np.float32]:
    """Return a copy of a layer's weight, or of some channels'.  float32 [channels, inputs]"""
    weight: NDArray[np.float32] = layer.weight.detach()[channels].float().cpu().numpy().copy()
    return as_rows(weight)


def apply_rows(layer: Layer, inputs: Tensor, rows: Tensor) -> Tensor:
    """Return the layer's linear map of its inputs with other rows and without bias.

    Args:
        layer: gives kernel, stride, padding and dilation.
        inputs: the layer's inputs, [N, ..., in] or [N, in channels, H, W].
        rows: any number of rows of the layer's length.  [rows, inputs]

    Returns:
        [N, tokens, rows]; the tokens of a convolution are its output positions.
    """
    if isinstance(layer, nn.Linear):
        mapped = nn.functional.linear(inputs, rows)
        return mapped.reshape(mapped.shape[0], -1, mapped.shape[-1])
    kernel = rows.reshape(-1, *layer.weight.shape[1:])
    mapped = nn.functional.conv2d(
        inputs, kernel, None, layer.stride, layer.padding, layer.dilation, layer.groups
    )
    return mapped.flatten(2).transpose(1, 2)


def as_tokens(layer: Layer, outputs: Tensor) -> Tensor:
    """View a layer's outputs, or gradients of them, as [N, tokens, channels]."""
    if isinstance(layer, nn.Linear):
        return outputs.reshape(outputs.shape[0], -1, outputs.shape[-1])
    return outputs.flatten(2).transpose(1, 2)


def error_rows(
    layer: Layer,
    bits: int,
    quantizer: QuantizerSpec,
    channels: slice = slice(None),
) -> NDArray[np.float32]:
    """Return what quantizing channels to one width adds to their weights, a few rows at a time.

    Beside the result `rounding_bytes` are taken.

    Args:
        layer: its weights stay as they are.
        bits: the width.
        quantizer: how.
        channels: which; all by default.

    Returns:
        float32 [channels, inputs]
    """
    count, inputs = layer.weight.shape[0], layer.weight[0].numel()
    start, stop, _ = channels.indices(count)
    errors = np.empty((stop - start, inputs), np.float32)
    step = max(1, _ROUNDED_WEIGHTS // inputs)
    for first in range(start, stop, step):
        rows = weight_rows(layer, slice(first, min(first + step, stop)))
        rounded = quantize_channels(rows, bits, quantizer).dequantize()
        np.subtract(rounded, rows, out=errors[first - start : first - start + len(rows)])
    return errors


def rounding_bytes(channels: int, inputs: int) -> int:
    """Return what the quantizer takes beside weights and errors when it rounds such a layer."""
    return _BYTES_PER_ROUNDED * inputs * min(channels, max(1, _ROUNDED_WEIGHTS // inputs))


@contextlib.contextmanager
def replaced_weights(layers: Layers, rows: Mapping[str, NDArray[np.float32]]) -> Iterator[None]:
    """Run the block with other weights; the old ones return bit for bit, even on an error.

    Args:
        layers: by name.
        rows: layer name -> float32 [channels, inputs]; layers not named keep their weights.
    """
    before = {name: layers[name].weight for name in rows}
    try:
        for name, values in rows.items():
            # In float32 whatever the weights are stored as.
            weight = torch.tensor(values, device=before[name].device).reshape(before[name].shape)
            layers[name].weight = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for name, parameter in before.items():
            layers[name].weight = parameter


def planned_rows(
    name: str,
    rows: NDArray[np.float32],
    plan: BitPlan,
    kept: dict[int, Steps] | None = None,
) -> NDArray[np.float32]:
    """Return a layer's weights as a plan's engine computes with them, [channels, inputs].

    Args:
        name: of the layer.
        rows: its float weights.
        plan: gives its widths.
        kept: steps of a plan without codes; see `quantize_channels`.
    """
    if plan.rounding is not None:
        order = plan.stored_order(name)
        return plan.rounding.layers[name].rows(plan.widths[name], plan.quantizer, order)
    if name in plan.couplings:
        coupling = plan.couplings[name]
        return fake_quantize_coupled(rows, plan.widths[name], plan.quantizer, coupling, kept)
    return fake_quantize(rows, plan.widths[name], plan.quantizer, kept=kept)


@contextlib.contextmanager
def fake_quantized(policy: Policy, plan: BitPlan) -> Iterator[None]:
    """Run the block with the policy's weights and activations as the plan's engine has them.

    Biases stay: a channel of 0 bits puts out its bias. Consumers of coupled layers are quantized
    in their producers' order; see `quantizer.coupling`. Hidden units that leave an MLP are not
    rounded on their way: the engine has their constant outputs in the consumer's bias. Of a plan
    with a rounding they have no weights there.

    Raises:
        PlanMismatch: the plan is for another policy, or has no codes yet.
    """
    layers = traced_layers(policy)
    plan.require_fits(layer_shapes(layers), policy.digest)
    require_rounded(plan)
    rows = {name: planned_rows(name, weight_rows(layers[name]), plan) for name in plan.widths}
    removed = {name: coupling.constant_units for name, coupling in plan.couplings.items()}
    with (
        replaced_weights(layers, rows),
        rounded_inputs(layers, plan.activations, removed),
    ):
        yield


@contextlib.contextmanager
def rounded_inputs(
    layers: Layers,
    activations: ActivationRanges | None,
    untouched: Mapping[str, NDArray[np.int64]] | None = None,
) -> Iterator[None]:
    """Run the block with the layers' inputs rounded as the engine rounds them.

    Gradients pass as if nothing were rounded.

    Args:
        layers: by name.
        activations: how; None for not at all. Layers without a range keep their inputs.
        untouched: layer name -> indices of the last axis that stay as they are.
    """
    handles = []
    try:
        for name in () if activations is None else activations.ranges:
            assert activations is not None
            kept = torch.from_numpy((untouched or {}).get(name, np.zeros(0, np.int64)))
            hook = _rounding_hook(
                float(activations.scale(name)),
                activations.codes,
                kept,
                name in activations.per_token,
            )
            handles.append(layers[name].register_forward_pre_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rounding_hook(
    scale: float, codes: tuple[int, int], untouched: Tensor, per_token: bool
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def round_inputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = arguments[0]
        # A tensor: by a Python number torch may multiply with the reciprocal, which rounds
        # differently.
        step = torch.tensor(scale, dtype=inputs.dtype, device=inputs.device)
        with torch.no_grad():
            sizes = _token_sizes(inputs, untouched) if per_token else None
            quotients = inputs if sizes is None else inputs / sizes
            rounded = (quotients / step).round_().clamp_(*codes).mul_(step)
            if sizes is not None:
                rounded.mul_(sizes)
            if len(untouched):
                rounded[..., untouched] = inputs[..., untouched]
        # The difference is exactly zero and carries the gradient.
        return (rounded + (inputs - inputs.detach()), *arguments[1:])

    return round_inputs


def _token_sizes(inputs: Tensor, untouched: Tensor) -> Tensor:
    """Return the largest |x| of each token, but of numbers that leave the graph.  [..., 1]"""
    sizes = inputs.abs()
    if len(untouched):
        sizes[..., untouched] = 0
    return sizes.amax(dim=-1, keepdim=True).clamp_(min=SMALLEST_TOKEN)
