"""Which layers reach the action: those whose weights get a gradient from it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


@torch.enable_grad()
def reached_layers(
    layers: Mapping[str, nn.Linear | nn.Conv2d], output: Callable[[], Tensor]
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers whose weights get a gradient from an output; a layer without is dead.

    Args:
        layers: by name; their weights are left as they are.
        output: computes what every layer that reaches the action reaches.
    """
    weights = [layer.weight for layer in layers.values()]
    for weight in weights:
        weight.requires_grad_(True)
    try:
        gradients = torch.autograd.grad(output().sum(), weights, allow_unused=True)
    finally:
        for weight in weights:
            weight.requires_grad_(False)
    reached = zip(layers.items(), gradients, strict=True)
    return {name: layer for (name, layer), gradient in reached if gradient is not None}


def linear_layers(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return all linear and convolution layers of a network, by name."""
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
