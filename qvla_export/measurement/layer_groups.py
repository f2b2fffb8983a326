"""Layers measured together: as many as fit into a bound of memory, the rest in further passes.

What a layer takes is counted here; a layer that is too large by itself is cut into its channels.
"""

import bisect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
class Phase:
    """Bytes of one of the things that are done with a layer; they come one after another."""

    # Whether observations run through the layer's part meanwhile, with a graph.
    runs: bool
    # What stays while the layer's group is in this phase: whatever the number of channels, and for
    # each of them.
    stays: int = 0
    stays_per_channel: int = 0
    # What comes and goes, one layer at a time.
    passes: int = 0
    passes_per_channel: int = 0


@dataclass(frozen=True)
class LayerNeeds:
    """What measuring a layer takes."""

    channels: int
    # All layers that are measured together have the same ones, in the same order.
    phases: tuple[Phase, ...]

    def nbytes(self, channels: int | None = None, pass_bytes: int = 0) -> int:
        """Return what some of the channels, or all, take by themselves.

        Args:
            channels: their number; None for all.
            pass_bytes: of an observation on its way through the part.
        """
        return _group_bytes([(self, channels or self.channels)], pass_bytes)

    def fitting(self, nbytes: int, pass_bytes: int = 0) -> int:
        """Return how many channels fit into some bytes; 0 if not even one in `_MOST_PIECES`."""
        fewest = -(-self.channels // _MOST_PIECES)
        counts = range(fewest, self.channels + 1)
        fitting = bisect.bisect_right(counts, nbytes, key=lambda n: self.nbytes(n, pass_bytes))
        return counts[fitting - 1] if fitting else 0


def _group_bytes(members: Sequence[tuple[LayerNeeds, int]], pass_bytes: int) -> int:
    """Return what some channels of each layer of a group take in the phase that takes most."""
    most = 0
    for phases in zip(*(needs.phases for needs, _ in members), strict=True):
        counted = [(phase, count) for phase, (_, count) in zip(phases, members, strict=True)]
        stays = sum(phase.stays + count * phase.stays_per_channel for phase, count in counted)
        passes = max(phase.passes + count * phase.passes_per_channel for phase, count in counted)
        most = max(most, stays + passes + (pass_bytes if phases[0].runs else 0))
    return most


def passed_bytes(channels: int, numbers: tuple[int, int], beside: int = 0) -> Phase:
    """Return the phase in which a pass records what a layer takes and returns.

    Args:
        channels: of the layer.
        numbers: that a pass puts in and out: inputs, outputs and their gradients stay.
        beside: numbers as large as the outputs that stay for each channel as well.
    """
    taken, returned = numbers
    tokens = -(-returned // channels)
    return Phase(
        True,
        _FLOAT_BYTES * (taken + 2 * returned),
        _FLOAT_BYTES * beside * tokens,
        passes_per_channel=_FLOAT_BYTES * tokens,
    )


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
    """Return what each layer takes: its errors are made, then they meet what a pass moves.

    Args:
        layers: at least the named ones.
        moved: layer name -> how many numbers a pass puts in and out.
        widths: that are measured.
    """
    shapes = layer_shapes({name: layers[name] for name in moved})
    found = {}
    for name, (channels, inputs) in shapes.items():
        # The weight errors of every width but 0.
        errors = _FLOAT_BYTES * sum(bits != 0 for bits in widths) * inputs
        made = Phase(False, 0, errors, rounding_bytes(channels, inputs) if widths else 0)
        met = passed_bytes(channels, moved[name], len(widths))
        met = replace(met, stays_per_channel=met.stays_per_channel + errors)
        found[name] = LayerNeeds(channels, (made, met))
    return found


def fitting_groups(
    layers: Mapping[str, LayerNeeds],
    max_bytes: int | None,
    beside: int = 0,
    cut: bool = True,
    pass_bytes: int = 0,
) -> list[list[Piece]]:
    """Cut layers, in their order, into groups that fit; those too large alone into pieces.

    The pieces of a layer are in groups that follow each other.

    Args:
        layers: what each takes.
        max_bytes: bound of one group and what is beside it; None puts all layers into one.
        beside: bytes that are taken anyway.
        cut: whether a layer may be cut.
        pass_bytes: of an observation on its way through the part.

    Raises:
        QvlaError: a small piece of a layer needs more; the message says how much.
    """
    groups: list[list[Piece]] = [[]]
    room = None if max_bytes is None else max_bytes - beside
    for name, needs in layers.items():
        step = needs.channels if room is None else needs.fitting(room, pass_bytes)
        if not step or (not cut and step < needs.channels):
            fewest = -(-needs.channels // _MOST_PIECES) if cut else needs.channels
            needed = beside + needs.nbytes(fewest, pass_bytes)
            raise _too_small(name, needed, max_bytes or 0, beside)
        for start in range(0, needs.channels, step):
            piece = Piece(name, start, min(start + step, needs.channels))
            full = room is not None and (
                group_bytes(layers, [*groups[-1], piece], pass_bytes) > room
            )
            if start or (full and groups[-1]):
                groups.append([])
            groups[-1].append(piece)
    return groups


def group_bytes(
    layers: Mapping[str, LayerNeeds], group: Sequence[Piece], pass_bytes: int = 0
) -> int:
    """Return what a group of layers takes while it is measured.

    Args:
        layers: what each takes.
        group: of them.
        pass_bytes: of an observation on its way through the part.
    """
    counted = [(layers[piece.layer], piece.stop - piece.start) for piece in group]
    return max(_group_bytes(counted, pass_bytes), pass_bytes)


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
