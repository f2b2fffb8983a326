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

from qvla_export.action import ActionChunk
from qvla_export.baselines.baseline import Baseline, BaselineLayer
from qvla_export.errors import QvlaError
from qvla_export.layers import layer_shapes, replaced_weights, rounded_inputs, traced_layers
from qvla_export.observation import Observation
from qvla_export.policies.base import Policy


@contextlib.contextmanager
def baseline_applied(policy: Policy, baseline: Baseline) -> Iterator[None]:
    """Run the block with the policy's weights and layers' inputs as the baseline has them.

    Where inputs are not rounded, an input scale is multiplied into the weights: the same map.

    Raises:
        PlanMismatch: the baseline is of another policy.
        QvlaError: a convolution's rounded inputs would have to be scaled.
    """
    layers = traced_layers(policy)
    baseline.require_fits(layer_shapes(layers), policy.digest)
    rounded = {} if baseline.activations is None else baseline.activations.ranges
    rows = {name: _rows(layer, name in rounded) for name, layer in baseline.layers.items()}
    scales = {
        name: baseline.layers[name].input_scale
        for name in rounded
        if name in baseline.layers and baseline.layers[name].input_scale is not None
    }
    with (
        replaced_weights(layers, rows),
        _scaled_inputs(layers, scales),
        rounded_inputs(layers, baseline.activations),
    ):
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
    if layer.input_scale is None or rounded:
        return rows
    return rows * layer.input_scale.astype(np.float32)


@contextlib.contextmanager
def _scaled_inputs(
    layers: Mapping[str, nn.Linear | nn.Conv2d],
    scales: Mapping[str, NDArray[np.float16] | None],
) -> Iterator[None]:
    handles = []
    try:
        for name, scale in scales.items():
            layer = layers[name]
            if not isinstance(layer, nn.Linear) or scale is None:
                raise QvlaError(
                    f"layer {name} is a convolution: a baseline may round its inputs or scale "
                    "them, not both; make the baseline anew: qvla baseline"
                )
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
