"""Run a policy in float64, so that deviations below float32's last digit show.

Wide layers at 8 bits move the action by less than two float32 passes differ.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qvla_export.policies.base import Policy, PolicyBatch


class _Float64(TorchFunctionMode):
    """Takes float64 wherever code names float32: norms and softmax do so by themselves."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        named = {name: _wider(value) for name, value in (kwargs or {}).items()}
        return func(*map(_wider, args), **named)


@contextlib.contextmanager
def in_float64(policy: Policy) -> Iterator[None]:
    """Run the block with the policy's numbers in float64; they return as they were, bit for bit.

    Args:
        policy: whole in memory; twice that is taken beside it.
    """
    module = policy.module
    held = [*module.parameters(), *module.buffers()]
    before = [(tensor, tensor.data) for tensor in held if tensor.is_floating_point()]
    default = torch.get_default_dtype()
    try:
        for tensor, data in before:
            tensor.data = data.double()
        torch.set_default_dtype(torch.float64)
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(default)
        for tensor, data in before:
            tensor.data = data


def batch_in_float64(batch: PolicyBatch) -> PolicyBatch:
    """Return a batch whose pictures, states and noise are float64."""
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(
        batch,
        **{
            name: value.double()
            for name, value in tensors.items()
            if isinstance(value, Tensor) and value.is_floating_point()
        },
    )


def _wider(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
