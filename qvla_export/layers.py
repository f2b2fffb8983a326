"""A policy's quantizable layers: their shapes, weights as rows, and temporary replacement."""

import contextlib
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qvla_export.plan import BitPlan
from qvla_export.policies.base import Policy
from qvla_export.quantize import as_rows, fake_quantize


def layer_shapes(layers: Mapping[str, nn.Linear | nn.Conv2d]) -> dict[str, tuple[int, int]]:
    """Return (channels, weights of one channel) of each layer."""
    return {
        name: (layer.weight.shape[0], layer.weight[0].numel()) for name, layer in layers.items()
    }


def weight_rows(layer: nn.Linear | nn.Conv2d) -> NDArray[np.float32]:
    """Return a copy of a layer's weight.  float32 [channels, inputs]"""
    weight: NDArray[np.float32] = layer.weight.detach().float().cpu().numpy().copy()
    return as_rows(weight)


@contextlib.contextmanager
def replaced_weights(
    layers: Mapping[str, nn.Linear | nn.Conv2d], rows: Mapping[str, NDArray[np.float32]]
) -> Iterator[None]:
    """Run the block with other weights; the old ones return bit for bit, even on an error.

    Args:
        layers: by name.
        rows: layer name -> float32 [channels, inputs]; layers not named keep their weights.
    """
    kept = {name: layers[name].weight.detach().clone() for name in rows}
    try:
        with torch.no_grad():
            for name, values in rows.items():
                weight = layers[name].weight
                weight.copy_(torch.from_numpy(values).reshape(weight.shape))
        yield
    finally:
        with torch.no_grad():
            for name, weight in kept.items():
                layers[name].weight.copy_(weight)


@contextlib.contextmanager
def fake_quantized(policy: Policy, plan: BitPlan) -> Iterator[None]:
    """Run the block with the policy's weights as the plan's engine will have them.

    Biases stay: a channel of 0 bits puts out its bias.

    Raises:
        PlanMismatch: the plan is for another policy.
    """
    layers = policy.layers()
    plan.require_fits(layer_shapes(layers), policy.digest)
    rows = {
        name: fake_quantize(weight_rows(layers[name]), widths, plan.quantizer)
        for name, widths in plan.widths.items()
    }
    with replaced_weights(layers, rows):
        yield
