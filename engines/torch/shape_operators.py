"""Operators that move numbers and change shapes, in torch; see `engines.torch.onnx_operators`."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engines.base import EngineError

Attributes = Mapping[str, Any]


def numbers(values: Tensor) -> list[int]:
    """Return whole numbers of a tensor on the CPU."""
    found: list[int] = values.reshape(-1).tolist()
    return found


def expand(_: Attributes, values: Tensor, shape: Tensor) -> Tensor:
    """Broadcast in both directions."""
    sizes = numbers(shape)
    rank = max(len(sizes), values.dim())
    mine = [1] * (rank - values.dim()) + list(values.shape)
    theirs = [1] * (rank - len(sizes)) + sizes
    return values.expand([b if a == 1 else a for a, b in zip(mine, theirs, strict=True)])


def gather(attributes: Attributes, values: Tensor, places: Tensor) -> Tensor:
    """Pick along an axis; places below 0 count from its end."""
    axis = attributes.get("axis", 0) % values.dim()
    if places.dim() == 0 and places.device.type == "cpu":
        return values.select(axis, int(places))
    flat = places.reshape(-1).to(values.device)
    flat = torch.where(flat < 0, flat + values.shape[axis], flat)
    found = values.index_select(axis, flat)
    return found.reshape(*values.shape[:axis], *places.shape, *values.shape[axis + 1 :])


def gather_nd(attributes: Attributes, values: Tensor, places: Tensor) -> Tensor:
    """Pick by whole tuples of places, for each of the leading axes by itself."""
    batch = attributes.get("batch_dims", 0)
    places = places.to(values.device)
    heads = [
        torch.arange(size, device=values.device).reshape(
            [-1 if n == axis else 1 for n in range(places.dim() - 1)]
        )
        for axis, size in enumerate(places.shape[:batch])
    ]
    return values[tuple(heads) + tuple(places[..., n] for n in range(places.shape[-1]))]


def from_last(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """Return pads as torch takes them: pairs from the last axis on."""
    pairs = zip(reversed(begins), reversed(ends), strict=True)
    return [count for pair in pairs for count in pair]


def pad(
    attributes: Attributes,
    values: Tensor,
    pads: Tensor,
    filler: Tensor | None = None,
    axes: Tensor | None = None,
) -> Tensor:
    """Fill up with one number."""
    if attributes.get("mode", "constant") != "constant":
        raise EngineError(f"Pad of a bundle has mode constant, got {attributes['mode']}")
    counts, rank = numbers(pads), values.dim()
    places = range(rank) if axes is None else [axis % rank for axis in numbers(axes)]
    begins, ends = [0] * rank, [0] * rank
    for number, axis in enumerate(places):
        begins[axis], ends[axis] = counts[number], counts[number + len(places)]
    filling = 0.0 if filler is None else float(filler)
    return functional.pad(values, from_last(begins, ends), value=filling)


def reshape(attributes: Attributes, values: Tensor, shape: Tensor) -> Tensor:
    """Lay out anew; 0 keeps an axis as it is."""
    sizes = numbers(shape)
    if not attributes.get("allowzero", 0):
        sizes = [values.shape[n] if size == 0 else size for n, size in enumerate(sizes)]
    return values.reshape(sizes)


def shape_of(attributes: Attributes, values: Tensor) -> Tensor:
    """Return the sizes of some axes, on the CPU."""
    stop = attributes.get("end", values.dim())
    return torch.tensor(values.shape[attributes.get("start", 0) : stop], dtype=torch.int64)


def cut(
    _: Attributes,
    values: Tensor,
    starts: Tensor,
    ends: Tensor,
    axes: Tensor | None = None,
    steps: Tensor | None = None,
) -> Tensor:
    """Cut a stretch out of some axes."""
    first, last = numbers(starts), numbers(ends)
    along = list(range(len(first))) if axes is None else numbers(axes)
    strides = [1] * len(first) if steps is None else numbers(steps)
    if min(strides) < 1:
        raise EngineError(f"Slice of a bundle goes forwards, got steps {strides}")
    places = [slice(None)] * values.dim()
    for axis, start, stop, stride in zip(along, first, last, strides, strict=True):
        size = values.shape[axis]  # ends may be the largest number there is
        places[axis] = slice(max(start, -size), min(stop, size), stride)
    return values[tuple(places)]


def split(
    attributes: Attributes, values: Tensor, sizes: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Cut an axis into pieces."""
    axis = attributes.get("axis", 0)
    if sizes is not None:
        return torch.split(values, numbers(sizes), axis)
    return torch.split(values, -(-values.shape[axis] // attributes["num_outputs"]), axis)


def squeeze(_: Attributes, values: Tensor, axes: Tensor | None = None) -> Tensor:
    """Drop axes of one."""
    return values.squeeze() if axes is None else values.squeeze(tuple(numbers(axes)))


def unsqueeze(_: Attributes, values: Tensor, axes: Tensor) -> Tensor:
    """Add axes of one."""
    found = numbers(axes)
    rank = values.dim() + len(found)
    for axis in sorted(axis % rank for axis in found):
        values = values.unsqueeze(axis)
    return values
