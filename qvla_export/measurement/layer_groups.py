"""Layers measured together: as many as fit into a bound of memory, the rest in further passes.

What a layer takes is counted here; a layer that is too large by itself is cut into its channels.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers, layer_shapes, rounding_bytes
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

_FLOAT_BYTES = 4
# A layer is cut into no more: each takes passes of its own.
_MOST_PIECES = 64


@dataclass(frozen=True)
class Piece:
    """Consecutive channels of a layer, [start, stop)."""

    layer: str
    start: int
    stop: int

    @property
    def channels(self) -> slice:
        """Return them as an index."""
        return slice(self.start, self.stop)


@dataclass(frozen=True)
class LayerNeeds:
    """What measuring a layer takes: what stays while its group is measured, what comes and goes."""

    channels: int
    # Weights of one channel.
    inputs: int
    # Numbers that a pass puts in and out.
    numbers_in: int
    numbers_out: int
    # Widths that are measured.
    widths: tuple[int, ...]
    # What else comes and goes: whatever the number of channels, and for each.
    more_bytes: int = 0
    more_bytes_per_channel: int = 0

    def kept_bytes(self, channels: int) -> int:
        """Return what some of the channels take.

        The weight errors of every width but 0; for one pass, the inputs, outputs and gradients of
        the layer, and of these channels the output errors of every width.
        """
        errors = sum(bits != 0 for bits in self.widths) * channels * self.inputs
        passed = self.numbers_in + 2 * self.numbers_out + len(self.widths) * self._share(channels)
        return _FLOAT_BYTES * (errors + passed)

    def passing_bytes(self, channels: int) -> int:
        """Return what comes and goes: the quantizer's temporaries, a product of gradients."""
        rounding = rounding_bytes(channels, self.inputs) if self.widths else 0
        more = self.more_bytes + channels * self.more_bytes_per_channel
        return max(rounding, more, _FLOAT_BYTES * self._share(channels))

    def nbytes(self, channels: int | None = None) -> int:
        """Return what some of the channels, or all, take by themselves."""
        count = self.channels if channels is None else channels
        return self.kept_bytes(count) + self.passing_bytes(count)

    def fitting(self, nbytes: int) -> int:
        """Return how many channels fit into some bytes; 0 if not even one in `_MOST_PIECES`."""
        fewest = -(-self.channels // _MOST_PIECES)
        counts = range(fewest, self.channels + 1)
        fitting = bisect.bisect_right(counts, nbytes, key=self.nbytes)
        return counts[fitting - 1] if fitting else 0

    def _share(self, channels: int) -> int:
        return -(-self.numbers_out * channels // self.channels)


# Layers, and how many numbers a pass puts into and out of each -> what each needs.
NeedsOf = Callable[[Layers, Mapping[str, tuple[int, int]]], Mapping[str, LayerNeeds]]


def layer_groups(
    policy: Policy,
    layers: Layers,
    observations: Sequence[Observation],
    needs_of: NeedsOf,
    max_bytes: int | None,
) -> list[list[str]]:
    """Cut the layers, in forward order, into groups that fit.

    The policy and the activations that autograd keeps of one pass come on top.

    Args:
        policy: gives the number of each layer's tokens, by a pass.
        layers: of the policy.
        observations: one batch.
        needs_of: layers and how many numbers a pass moves -> what each layer needs.
        max_bytes: bound of one group; None puts all layers into one.

    Raises:
        QvlaError: a single layer needs more; the message says how much.
    """
    if max_bytes is None:
        return [list(layers)]
    moved = _moved_numbers(policy, layers, observations)
    # Spreads are of whole layers, and the sums of a group do not know of another's.
    groups = fitting_groups(needs_of(layers, moved), max_bytes, cut=False)
    return [[piece.layer for piece in group] for group in groups]


def layer_needs(
    layers: Layers, moved: Mapping[str, tuple[int, int]], widths: tuple[int, ...]
) -> dict[str, LayerNeeds]:
    """Return what each layer takes.

    Args:
        layers: at least the named ones.
        moved: layer name -> how many numbers a pass puts in and out.
        widths: that are measured.
    """
    shapes = layer_shapes({name: layers[name] for name in moved})
    return {
        name: LayerNeeds(channels, inputs, moved[name][0], moved[name][1], widths)
        for name, (channels, inputs) in shapes.items()
    }


def fitting_groups(
    layers: Mapping[str, LayerNeeds], max_bytes: int | None, beside: int = 0, cut: bool = True
) -> list[list[Piece]]:
    """Cut layers, in their order, into groups that fit; those too large alone into pieces.

    The pieces of a layer are in groups that follow each other.

    Args:
        layers: what each takes.
        max_bytes: bound of one group and what is beside it; None puts all layers into one.
        beside: bytes that are taken anyway.
        cut: whether a layer may be cut.

    Raises:
        QvlaError: a small piece of a layer needs more; the message says how much.
    """
    groups: list[list[Piece]] = [[]]
    kept = passing = 0
    for name, needs in layers.items():
        room = None if max_bytes is None else max_bytes - beside
        step = needs.channels if room is None else needs.fitting(room)
        if not step or (not cut and step < needs.channels):
            fewest = -(-needs.channels // _MOST_PIECES) if cut else needs.channels
            raise _too_small(name, beside + needs.nbytes(fewest), max_bytes or 0, beside)
        for start in range(0, needs.channels, step):
            piece = Piece(name, start, min(start + step, needs.channels))
            count = piece.stop - start
            kept += needs.kept_bytes(count)
            passing = max(passing, needs.passing_bytes(count))
            full = room is not None and kept + passing > room
            if start or (full and groups[-1]):
                groups.append([])
                kept, passing = needs.kept_bytes(count), needs.passing_bytes(count)
            groups[-1].append(piece)
    return groups


def group_bytes(layers: Mapping[str, LayerNeeds], group: Sequence[Piece]) -> int:
    """Return what a group of layers takes while it is measured."""
    counts = [(layers[piece.layer], piece.stop - piece.start) for piece in group]
    kept = sum(needs.kept_bytes(count) for needs, count in counts)
    return kept + max((needs.passing_bytes(count) for needs, count in counts), default=0)


def _too_small(name: str, need: int, max_bytes: int, beside: int) -> QvlaError:
    rest = f", {beside / 1e9:.3g} GB of them weights, activations and sums" if beside else ""
    return QvlaError(f"layer {name} needs {need / 1e9:.4g} GB{rest}; {too_small(need, max_bytes)}")


def too_small(need: int, max_bytes: int) -> str:
    """Return what is to be done about a bound that leaves too little."""
    missing = math.ceil((need - max_bytes) / 1e7) / 100
    return (
        f"the bound leaves {max_bytes / 1e9:.4g} GB: raise it by {missing} GB (--max-memory-gb) or "
        "run fewer observations together (--batch-size)"
    )


def _moved_numbers(
    policy: Policy, layers: Layers, observations: Sequence[Observation]
) -> dict[str, tuple[int, int]]:
    """Return how many numbers a batch puts into and out of each layer."""
    moved: dict[str, tuple[int, int]] = {}

    def counter(name: str) -> RemovableHandle:
        def count(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            before = moved.get(name, (0, 0))
            moved[name] = (before[0] + arguments[0].numel(), before[1] + output.numel())

        return layers[name].register_forward_hook(count)

    batch = policy.batch(observations)
    handles = [counter(name) for name in layers]
    try:
        with torch.no_grad():
            policy.normalized_actions(batch)
    finally:
        for handle in handles:
            handle.remove()
    return moved
