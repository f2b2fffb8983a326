"""A policy with a baseline's weights and rounded inputs: what is judged."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qvla_export.baselines.baseline import Baseline, BaselineLayer
from qvla_export.baselines.hadamard import rotate
from qvla_export.baselines.layer_adapter import GroupedLinear
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import (
    layer_shapes,
    replaced_weights,
    rounded_inputs,
    traced_layers,
)
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation


@contextlib.contextmanager
def baseline_applied(policy: Policy, baseline: Baseline) -> Iterator[None]:
    """Run the block with the policy's weights and layers' inputs as the baseline has them.

    Where inputs are not rounded, an input scale is multiplied into the weights: the same map. A
    convolution whose rounded inputs are scaled is run as the linear map of its patches it is.

    Raises:
        PlanMismatch: the baseline is of another policy.
    """
    layers = traced_layers(policy)
    baseline.require_fits(layer_shapes(layers), policy.digest)
    rounded = {} if baseline.activations is None else baseline.activations.ranges
    rows = {name: _rows(layer, name in rounded) for name, layer in baseline.layers.items()}
    scales = {}
    for name, quantized in baseline.layers.items():
        if name in rounded and quantized.input_scale is not None:
            scales[name] = quantized.input_scale
    with ExitStack() as stack:
        stack.enter_context(replaced_weights(layers, rows))
        run = {name: layers[name] for name in rounded}
        for name in scales:
            layer = layers[name]
            if isinstance(layer, nn.Conv2d):
                run[name] = stack.enter_context(_run_by_patches(layer))
        stack.enter_context(_scaled_inputs({name: (run[name], scales[name]) for name in scales}))
        stack.enter_context(rounded_inputs(run, baseline.activations))
        yield


class BaselinePolicy:
    """A float policy that acts as the baseline does until it is closed."""

    def __init__(self, policy: Policy, baseline: Baseline) -> None:
        self._policy = policy
        self._stack = ExitStack()
        self._stack.enter_context(baseline_applied(policy, baseline))

    def infer(self, observation: Observation) -> ActionChunk:
        """Act on one observation."""
        return self._policy.infer(observation)

    def close(self) -> None:
        """Give the policy its own weights back."""
        self._stack.close()


@dataclass(frozen=True)
class BaselineSource:
    """Opens a baseline; picklable, so that worker processes open it themselves."""

    # Opens the policy it was made of, a `Policy`.
    policy: Callable[[], Any]
    folder: Path

    def __call__(self) -> BaselinePolicy:
        """Load both."""
        return BaselinePolicy(self.policy(), Baseline.load(self.folder))


def _rows(layer: BaselineLayer, rounded: bool) -> NDArray[np.float32]:
    rows = layer.weight.dequantize()
    if layer.rotation is not None:
        rows = rotate(rows, layer.rotation)
    if layer.input_scale is None or rounded:
        return rows
    return rows * layer.input_scale.astype(np.float32)


@contextlib.contextmanager
def _run_by_patches(layer: nn.Conv2d) -> Iterator[nn.Linear]:
    """Let a convolution compute by a linear layer, which is returned."""
    handed = GroupedLinear(layer, 1)
    assert "forward" not in vars(layer), "nobody else stands in for it"
    layer.forward = handed.forward  # type: ignore[method-assign,assignment]  # given back below
    try:
        yield handed.linear
    finally:
        del layer.forward  # what its class has is its own again


@contextlib.contextmanager
def _scaled_inputs(
    scales: Mapping[str, tuple[nn.Linear | nn.Conv2d, NDArray[np.float16]]],
) -> Iterator[None]:
    handles = []
    try:
        for layer, scale in scales.values():
            factors = torch.from_numpy(scale.astype(np.float32))
            handles.append(layer.register_forward_pre_hook(_scaling_hook(factors)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _scaling_hook(
    factors: Tensor,
) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def scale_inputs(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0] * factors.to(arguments[0].device), *arguments[1:])

    return scale_inputs
