"""What each part of a policy reads and makes, found by running it without numbers."""

import itertools
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qvla_export.policies.base import Policy, PolicyPart
from qvla_export.policies.layers import Layers

# Gradients that autograd holds at once, besides those that are asked for.
_ON_THE_WAY = 4


@dataclass(frozen=True)
class PartNeeds:
    """One part and what it takes to run it on one observation."""

    part: PolicyPart
    # Names of the parameters and buffers of the policy that it reads, and their float32 bytes.
    reads: tuple[str, ...]
    weight_bytes: int
    # Its quantizable layers, in forward order -> how many numbers go in and come out.
    moved: Mapping[str, tuple[int, int]]
    # Of all tensors that it makes on the way: more than autograd keeps.
    made_bytes: int
    # Of the largest of these tensors.
    largest_bytes: int
    output_bytes: int
    # Inputs that are outputs of other parts.
    made_by_others: tuple[str, ...]

    @property
    def pass_bytes(self) -> int:
        """Return the bytes of a pass through it with a graph, forward and back."""
        return self.made_bytes + _ON_THE_WAY * self.largest_bytes


def part_needs(policy: Policy, layers: Layers, feeds: Mapping[str, Tensor]) -> list[PartNeeds]:
    """Run a policy's smallest parts on device "meta" and note what they read and make.

    Args:
        policy: whose weights were left on disk.
        layers: its quantizable layers.
        feeds: model inputs of one observation, of the longest prompt.
    """
    named = dict(itertools.chain(policy.module.named_parameters(), policy.module.named_buffers()))
    values = {name: value.to("meta") for name, value in feeds.items()}
    found: list[PartNeeds] = []
    for part in policy.parts(1):
        watch = _Watch(named, layers)
        handles = [
            layer.register_forward_hook(watch.layer_hook(name)) for name, layer in layers.items()
        ]
        try:
            with torch.no_grad(), watch:
                output = part.module(*(values[name] for name in part.inputs))
        finally:
            for handle in handles:
                handle.remove()
        values[part.output] = output
        earlier = {needs.part.output for needs in found}
        found.append(watch.needs(part, output, earlier))
    return found


class _Watch(TorchFunctionMode):
    """Notes which weights are used and what is made of them."""

    def __init__(self, named: Mapping[str, Tensor], layers: Layers) -> None:
        super().__init__()
        self._named = named
        self._names = {id(tensor): name for name, tensor in named.items()}
        self._layers = layers
        self._read: dict[str, None] = {}
        self._moved: dict[str, tuple[int, int]] = {}
        # Kept, so that no two have the same address. They have no numbers.
        self._made: dict[int, Tensor] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Attributes such as dtype say nothing about numbers.
        if getattr(func, "__name__", "") != "__get__":
            for value in itertools.chain(args, *(a for a in args if isinstance(a, list | tuple))):
                if id(value) in self._names:
                    self._read[self._names[id(value)]] = None
            for value in (kwargs or {}).values():
                if id(value) in self._names:
                    self._read[self._names[id(value)]] = None
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result._base is None:
            self._made[id(result)] = result
        return result

    def layer_hook(self, name: str) -> Any:
        """Return the hook that notes how many numbers a layer moves."""

        def note(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self._moved[name] = (arguments[0].numel(), output.numel())

        return note

    def needs(self, part: PolicyPart, output: Tensor, earlier: Set[str]) -> PartNeeds:
        """Return what was noted."""
        own = {id(tensor) for tensor in self._named.values()}
        made = [tensor.nbytes for key, tensor in self._made.items() if key not in own]
        return PartNeeds(
            part,
            tuple(self._read),
            sum(4 * self._named[name].numel() for name in self._read),
            self._moved,
            sum(made),
            max(made, default=0),
            output.nbytes,
            tuple(name for name in part.inputs if name in earlier),
        )
