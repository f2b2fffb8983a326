"""Layers measured together: as many as fit into a bound of memory, the rest in further passes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvla_export.errors import QvlaError
from qvla_export.layers import layer_shapes
from qvla_export.observation import Observation
from qvla_export.policies.base import Policy

Layers = Mapping[str, nn.Linear | nn.Conv2d]
_FLOAT_BYTES = 4


def layer_groups(
    policy: Policy,
    layers: Layers,
    observations: Sequence[Observation],
    widths: int,
    max_bytes: int | None,
) -> list[list[str]]:
    """Cut the layers, in forward order, into groups that fit; see `fitting_groups`.

    The policy and the activations that autograd keeps of one pass come on top.

    Args:
        policy: gives the number of each layer's tokens, by a pass.
        layers: of the policy.
        observations: one batch.
        widths: how many.
        max_bytes: bound of one group; None puts all layers into one.

    Raises:
        QvlaError: a single layer needs more; the message says how much.
    """
    if max_bytes is None:
        return [list(layers)]
    return fitting_groups(layers, _moved_numbers(policy, layers, observations), widths, max_bytes)


def fitting_groups(
    layers: Layers,
    moved: Mapping[str, tuple[int, int]],
    widths: int,
    max_bytes: int | None,
    beside: int = 0,
) -> list[list[str]]:
    """Cut layers, in their order, into groups that fit.

    Args:
        layers: at least the named ones.
        moved: layer name -> how many numbers a pass puts in and out.
        widths: how many.
        max_bytes: bound of one group and what is beside it; None puts all layers into one.
        beside: bytes that are taken anyway.

    Raises:
        QvlaError: a single layer needs more; the message says how much.
    """
    if max_bytes is None:
        return [list(moved)]
    shapes = layer_shapes({name: layers[name] for name in moved})
    groups: list[list[str]] = []
    used = beside
    for name, shape in shapes.items():
        need = layer_bytes(shape, moved[name], widths)
        if beside + need > max_bytes:
            raise QvlaError(
                f"layer {name} alone needs {need / 1e9:.3g} GB{_beside(beside)}, more than the "
                f"bound of {max_bytes / 1e9:.3g} GB; raise the bound or run fewer observations "
                "together"
            )
        if not groups or used + need > max_bytes:
            groups.append([])
            used = beside
        groups[-1].append(name)
        used += need
    return groups or [[]]


def layer_bytes(shape: tuple[int, int], moved: tuple[int, int], widths: int) -> int:
    """Return what measuring a layer takes.

    Its weight errors at every width and, for one pass, its inputs, outputs, gradients and output
    errors at every width.

    Args:
        shape: (channels, weights of one channel).
        moved: how many numbers the pass puts in and out.
        widths: how many.
    """
    (channels, inputs), (fed, made) = shape, moved
    return _FLOAT_BYTES * (widths * channels * inputs + fed + (widths + 2) * made)


def _beside(nbytes: int) -> str:
    return f" beside {nbytes / 1e9:.3g} GB of weights and activations" if nbytes else ""


def _moved_numbers(
    policy: Policy, layers: Layers, observations: Sequence[Observation]
) -> dict[str, tuple[int, int]]:
    """Return how many numbers a batch puts into and out of each layer."""
    moved: dict[str, tuple[int, int]] = {}

    def counted(name: str) -> RemovableHandle:
        def count(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            moved[name] = (arguments[0].numel(), output.numel())

        return layers[name].register_forward_hook(count)

    handles = [counted(name) for name in layers]
    try:
        with torch.no_grad():
            policy.normalized_actions(policy.batch(observations))
    finally:
        for handle in handles:
            handle.remove()
    return moved
