"""A policy as libraries can quantize it: linear layers of whole groups, batches without padding.

Libraries for language models take linear layers whose inputs are whole groups. A convolution is
the linear map of its patches, and zeros fill a last group up; neither changes what is computed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.baselines.hadamard import hadamard, rotation_size
from qvla_export.policies.base import Policy, PolicyBatch
from qvla_export.policies.layers import traced_layers
from qvla_export.quantizer.quantized_weight import QuantizedWeight
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

_BATCH_SIZE = 16
# Of a step: what rounding of floats may leave between a library's weights and codes times scales.
_LARGEST_RESIDUE = 0.02
_SCALE_LIMITS: Mapping[int, tuple[float, float]] = {16: (2.0**-24, 65504.0), 32: (1e-30, 1e30)}


class GroupedLinear(nn.Module):
    """A layer as the linear map it is, its inputs rotated, then filled up to whole groups.

    Raises:
        QvlaError: a convolution in groups or with padding other than zeros.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, group_size: int, rotation: int = 1) -> None:
        super().__init__()
        rows = layer.weight.detach().flatten(1)
        # Of a block of inputs, see `hadamard.rotate`; None leaves them.
        self._rotation = None if rotation == 1 else torch.from_numpy(hadamard(rotation))
        rows = self._rotate(rows)
        self._missing = -rows.shape[1] % group_size
        self._patches: nn.Unfold | None = None
        self._geometry: tuple[tuple[int, ...], ...] | None = None
        if isinstance(layer, nn.Conv2d):
            if layer.groups != 1 or layer.padding_mode != "zeros" or layer.padding == "same":
                raise QvlaError(f"baselines take convolutions of one group, got {layer}")
            padding = (0, 0) if isinstance(layer.padding, str) else layer.padding
            self._geometry = (layer.kernel_size, layer.dilation, padding, layer.stride)
            self._patches = nn.Unfold(layer.kernel_size, layer.dilation, padding, layer.stride)
        self.linear = nn.Linear(rows.shape[1] + self._missing, len(rows), layer.bias is not None)
        self.linear.weight.data = nn.functional.pad(rows, (0, self._missing))
        if layer.bias is not None:
            self.linear.bias.data = layer.bias.detach().clone()
        self.linear.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """Return what callers read a layer's type from.  [channels, inputs and zeros]"""
        return self.linear.weight

    def forward(self, inputs: Tensor) -> Tensor:
        """Map what the layer takes to what it returns."""
        tokens = inputs if self._patches is None else self._patches(inputs).transpose(1, 2)
        mapped: Tensor = self.linear(nn.functional.pad(self._rotate(tokens), (0, self._missing)))
        if self._patches is None:
            return mapped
        height, width = (self._positions(inputs, axis) for axis in (0, 1))
        return mapped.transpose(1, 2).reshape(len(inputs), -1, height, width)

    def _rotate(self, values: Tensor) -> Tensor:
        if self._rotation is None:
            return values
        blocks = values.reshape(*values.shape[:-1], -1, len(self._rotation))
        rotated: Tensor = (blocks @ self._rotation.to(values)).flatten(-2)
        return rotated

    def _positions(self, inputs: Tensor, axis: int) -> int:
        """Return how many patches there are along an axis of the picture."""
        assert self._geometry is not None
        kernel, dilation, padding, stride = (values[axis] for values in self._geometry)
        covered = dilation * (kernel - 1) + 1
        return int(inputs.shape[axis - 2] + 2 * padding - covered) // stride + 1


def hand_over(
    policy: Policy, group_size: int | None, rotates: bool = False
) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the policy's quantizable layers; with groups, all of them linear, of whole groups.

    Changes the policy's module where a layer is not so by itself.

    Args:
        policy: becomes the library's.
        group_size: 1 for linear layers of any size, None for layers as they are.
        rotates: whether inputs are rotated, see `hadamard.rotate`.

    Returns:
        Layer name -> what stands for it in the module.
    """
    layers: dict[str, nn.Linear | nn.Conv2d] = {}
    for name, layer in traced_layers(policy).items():
        whole = isinstance(layer, nn.Linear) and layer.in_features % (group_size or 1) == 0
        if not rotates and (group_size is None or whole):
            layers[name] = layer
            continue
        rotation = rotation_size(layer.weight[0].numel()) if rotates else 1
        handed = GroupedLinear(layer, group_size or 1, rotation)
        policy.module.set_submodule(name, handed)
        layers[name] = handed.linear
    return layers


def module_names(module: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return layer name -> where what stands for it is in the module."""
    found = {id(child): name for name, child in module.named_modules()}
    return {name: found[id(layer)] for name, layer in layers.items()}


def even_batches(policy: Policy, observations: Sequence[Observation]) -> list[PolicyBatch]:
    """Return all observations in batches of equal prompt length, so that nothing is padded."""
    by_length: dict[int, list[Observation]] = {}
    for observation in observations:
        length = len(policy.processor.prompt_ids(observation))
        by_length.setdefault(length, []).append(observation)
    return [
        policy.batch(same[start : start + _BATCH_SIZE])
        for same in by_length.values()
        for start in range(0, len(same), _BATCH_SIZE)
    ]


def blocks_of(names: Iterable[str]) -> dict[str, list[str]]:
    """Group layers by the numbered block they are in; others stand alone.

    Returns:
        Module name of the block -> its layers, in their order.
    """
    blocks: dict[str, list[str]] = {}
    for name in names:
        numbered = re.match(r"(.*\.\d+)\.", name)
        blocks.setdefault(numbered[1] if numbered else name, []).append(name)
    return blocks


def coded(
    weights: NDArray[np.float32],
    scales: NDArray[np.float32],
    bits: int,
    group_size: int | None,
    inputs: int,
    scale_bits: int,
) -> QuantizedWeight:
    """Return a library's fake-quantized weights as the codes and scales they are made of.

    Args:
        weights: as the library computes with them.  float32 [channels, inputs and zeros]
        scales: steps between codes; may be negative, zero where a group is.  [channels, groups]
        bits: of a code.
        group_size: of the scales.
        inputs: without zeros that filled the last group up.
        scale_bits: of a stored scale, 16 or 32; what it is rounded to.

    Raises:
        QvlaError: the weights are not codes of this width times these scales.
    """
    scales = scales.reshape(len(weights), -1)
    low, high = _SCALE_LIMITS[scale_bits]
    signs = np.where(scales < 0, np.float32(-1), np.float32(1))
    steps = signs * np.abs(scales).clip(low, high)
    spread = np.repeat(steps, group_size or weights.shape[1], axis=1)[:, : weights.shape[1]]
    exact = weights / spread
    codes = np.rint(exact)
    residue = float(np.abs(exact - codes).max(initial=0.0))
    largest = 2 ** (bits - 1)
    if not residue <= _LARGEST_RESIDUE or codes.min() < -largest or codes.max() >= largest:
        raise QvlaError(
            f"the library's weights are not {bits}-bit codes times its scales: {residue:.3g} of a "
            f"step off, codes {codes.min()} to {codes.max()}; its version may not be the pinned one"
        )
    stored = steps.astype(np.float16 if scale_bits == 16 else np.float32)
    groups = 1 if group_size is None else -(-inputs // group_size)
    return QuantizedWeight(
        codes[:, :inputs].astype(np.int8), stored[:, :groups].copy(), bits, group_size
    )
