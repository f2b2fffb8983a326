"""Weights that stay as they are stored and are float32 only while they are computed with.

On a GPU a policy's bfloat16 weights take half of their float32 bytes. Each unit of the network, a
block of a tower or of the decoder, raises its own before it runs and lets them go after. Autograd
keeps what a product needs to go back; of a raised weight it keeps the stored one, and raises that
anew. A stored number and its float32 are the same number, so results are those of a policy in
float32 throughout.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

# Types that are raised; float64 is none that a network here computes in.
STORED_TYPES = (torch.bfloat16, torch.float16)
# Size, strides and offset of a view, or the tensor that autograd is given as it is.
_Packed = Tensor | tuple[Tensor, torch.Size, tuple[int, ...], int]


def put_weight(module: nn.Module, name: str, value: Tensor) -> Tensor:
    """Put a parameter or buffer in place of the one of that name; return the one before."""
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    before: Tensor = getattr(owner, leaf)
    is_parameter = isinstance(before, nn.Parameter) and not isinstance(value, nn.Parameter)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)
    return before


def raise_by_unit(module: nn.Module) -> None:
    """Let each unit of a network compute in float32 with its weights as they are stored.

    Args:
        module: its weights may be put in place before or after.
    """
    for _, unit in _units(module):
        unit.forward = _raising(unit, unit.forward)


@contextlib.contextmanager
def raised_by_unit(module: nn.Module) -> Iterator[None]:
    """As `raise_by_unit` while the block runs."""
    before = [(unit, vars(unit).get("forward")) for _, unit in _units(module)]
    raise_by_unit(module)
    try:
        yield
    finally:
        for unit, forward in before:
            restore_forward(unit, forward)


def restore_forward(module: nn.Module, forward: Callable[..., Any] | None) -> None:
    """Put back what stood in for a module's forward before; None: its class's own."""
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def weights_of_units(module: nn.Module) -> frozenset[str]:
    """Return the names of the parameters and buffers that units raise: the others are float32.

    Units are the entries of lists: blocks of the towers and of the decoder, nearly all weights.
    What stands beside them is looked at from outside as well.
    """
    return frozenset(
        f"{name}.{inner}"
        for name, unit in _units(module)
        for inner, _ in (*unit.named_parameters(), *unit.named_buffers())
    )


def _units(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield the entries of lists that are in no other list, by name."""
    for key, inner in module.named_children():
        path = f"{name}.{key}" if name else key
        if isinstance(inner, nn.ModuleList):
            yield from ((f"{path}.{index}", entry) for index, entry in enumerate(inner))
        else:
            yield from _units(inner, path)


def _raising(unit: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        # Storage of a raised weight -> the stored one; only as long as the unit runs, since the
        # allocator gives the same places to others later.
        raised: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> _Packed:
            stored = raised.get(tensor.untyped_storage().data_ptr())
            if stored is None or tensor.dtype != torch.float32:
                return tensor
            return stored, tensor.shape, tensor.stride(), int(tensor.storage_offset())

        def unpack(packed: _Packed) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            stored, size, strides, offset = packed
            return stored.float().as_strided(size, strides, offset)

        with _raised(unit, raised), saved_tensors_hooks(pack, unpack):
            return forward(*arguments, **named)

    return run


@contextlib.contextmanager
def _raised(unit: nn.Module, raised: dict[int, Tensor]) -> Iterator[None]:
    """Put float32 weights into a unit while the block runs, and note where they came from."""
    # torch's own functional_call swaps tensors in these tables, too: a weight whose gradient is
    # asked for is raised with a graph, which a parameter could not be.
    stored = [
        (table, name, tensor)
        for module in unit.modules()
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None and tensor.dtype in STORED_TYPES
    ]
    try:
        for table, name, tensor in stored:
            value = tensor.float()
            raised[value.untyped_storage().data_ptr()] = tensor.detach()
            cast("dict[str, Tensor]", table)[name] = value
        yield
    finally:
        raised.clear()
        for table, name, tensor in stored:
            cast("dict[str, Tensor]", table)[name] = tensor
