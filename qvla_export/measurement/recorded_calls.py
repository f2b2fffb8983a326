"""The noun `RecordedCalls`: what layers take and return in a pass with a graph, call by call.

A policy that integrates a flow calls its layers once a step. To the layer's weights these are more
tokens of one pass: a channel moves the action by what it does to all of them.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qvla_export.policies.layers import Layers, as_tokens
from qvla_export.shared.errors import QvlaError


@dataclass(frozen=True)
class RecordedCalls:
    """Calls of some layers, in the order in which they ran."""

    layers: Layers
    # Layer name -> its inputs, detached, and its outputs, of every call.
    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)

    @property
    def targets(self) -> list[Tensor]:
        """Return the outputs whose gradients are needed, of all calls, layer by layer."""
        return [output for name in self.layers for output in self.outputs[name]]

    def joined(self, found: Sequence[Tensor]) -> list[Tensor]:
        """Return gradients of `targets` by layer, tokens of all calls in one tensor."""
        gradients, start = [], 0
        for layer, calls in ((self.layers[name], self.outputs[name]) for name in self.layers):
            gradients.append(_joined(layer, found[start : start + len(calls)]))
            start += len(calls)
        return gradients

    def joined_inputs(self) -> dict[str, Tensor]:
        """Return each layer's inputs, those of several calls in one tensor."""
        return {name: _joined(self.layers[name], calls) for name, calls in self.inputs.items()}

    def joined_outputs(self) -> dict[str, Tensor]:
        """Return each layer's outputs, those of several calls in one tensor."""
        return {name: _joined(self.layers[name], calls) for name, calls in self.outputs.items()}


def _joined(layer: nn.Linear | nn.Conv2d, calls: Sequence[Tensor]) -> Tensor:
    """Return tensors [N, ..., width] side by side, [N, tokens, width]; a single one as it is."""
    if len(calls) == 1:
        return calls[0]
    return torch.cat([as_tokens(layer, call) for call in calls], dim=1)


@contextlib.contextmanager
def recording(layers: Layers) -> Iterator[RecordedCalls]:
    """Yield what the layers take and return while the block runs.

    Raises:
        QvlaError: a convolution is called more than once.
    """
    calls = RecordedCalls(layers)

    def recorder(name: str) -> Callable[..., None]:
        def record(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            if name in calls.outputs and not isinstance(module, nn.Linear):
                raise QvlaError(f"convolution {name} runs more than once in a pass; not supported")
            # All parameters are frozen, so the graph has to begin at the first layers' outputs.
            if not output.requires_grad:
                output.requires_grad_(True)
            calls.inputs.setdefault(name, []).append(arguments[0].detach())
            calls.outputs.setdefault(name, []).append(output)

        return record

    handles = [layer.register_forward_hook(recorder(name)) for name, layer in layers.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
