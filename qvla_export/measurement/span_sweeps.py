"""Layers a span at a time: moments are measured from weights on disk, used and dropped.

A span are layers whose moments are in memory together: those of one part where all observations go
through the policy at once, else as many parts as fit. All observations at once are one sweep, from
the last span to the first; of more batches, every span takes sweeps of its own.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from qvla_export.measurement.backward import Pass, ProbedBatch, Probes
from qvla_export.measurement.distributed import World
from qvla_export.measurement.layer_groups import LayerNeeds, NeedsOf, Piece
from qvla_export.measurement.measure_moments import ENERGIES, add_pass, layer_moments, pass_energies
from qvla_export.measurement.moment_bounds import (
    SMALLEST_BLOCK,
    MomentSettings,
    moment_needs,
    moment_sums,
    sum_bytes,
)
from qvla_export.measurement.peak_memory import available_bytes
from qvla_export.measurement.sharded_sums import ShardedSums
from qvla_export.measurement.stream_limits import StreamLimits, open_stream
from qvla_export.measurement.streamed import GroupPasses, Stream
from qvla_export.measurement.weight_placement import WeightPlacement
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers, traced_layers
from qvla_export.quantizer.moments import LayerMoments
from qvla_export.shared.allocator import return_freed_memory
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

# Of the memory that this machine has left, where no bound is set; of a bound, for a span's sums.
_SHARE_OF_FREE, _SHARE_OF_SUMS = 0.8, 1 / 3


# Layers, how many numbers a pass moves, how moments are measured -> what each layer needs.
SpanNeedsOf = Callable[
    [Layers, Mapping[str, tuple[int, int]], MomentSettings], Mapping[str, LayerNeeds]
]


@dataclass(frozen=True)
class SpanUse:
    """What is done with the moments of a span, as far as memory depends on it."""

    # Beside the sums.
    needs_of: SpanNeedsOf
    # Where all observations go at once: whether sums are there for a group of layers at a time, the
    # first pass for them and all other phases with the moments they became; else for a part.
    by_group: bool

    def needs(self, settings: MomentSettings, with_sums: bool) -> NeedsOf:
        """Return what tells the needs of layers, of their sums too where they are a group's."""

        def needs_of(
            layers: Layers, moved: Mapping[str, tuple[int, int]]
        ) -> Mapping[str, LayerNeeds]:
            found = self.needs_of(layers, moved, settings)
            if not (with_sums and self.by_group):
                return found
            summed = moment_needs(layers, moved, settings)
            return {
                name: _with_sums(needs, summed[name], sum_bytes({name: layers[name]}, settings))
                for name, needs in found.items()
            }

        return needs_of


def _with_sums(needs: LayerNeeds, summed: LayerNeeds, nbytes: int) -> LayerNeeds:
    """Put the phase in which sums grow before what is done with moments, half as large."""
    (first,) = (replace(phase, stays=phase.stays + nbytes) for phase in summed.phases)
    others = (replace(phase, stays=phase.stays + nbytes // 2) for phase in needs.phases)
    return replace(needs, phases=(first, *others))


class SpanSweeps:
    """Batches on their way through a policy, and the spans at which they stop.

    To be closed: between two spans the weights of a part are in memory.
    """

    def __init__(
        self,
        stream: Stream,
        batches: Sequence[ProbedBatch],
        spans: Sequence[Sequence[str]],
        settings: MomentSettings,
    ) -> None:
        self.stream, self.batches, self.spans, self.settings = stream, batches, spans, settings
        self._sweep: Generator[tuple[Sequence[Piece], GroupPasses]] | None = None

    def close(self) -> None:
        """Leave the sweep that goes on from span to span; the policy is as before."""
        if self._sweep is not None:
            self._sweep.close()
            self._sweep = None

    @property
    def at_once(self) -> bool:
        """Whether all observations go through the policy together."""
        return len(self.batches) == 1

    def groups(
        self, number: int, todo: Sequence[int]
    ) -> Iterator[tuple[ProbedBatch, Sequence[Piece], GroupPasses]]:
        """Yield the groups of a span's layers, with the passes of each batch.

        Args:
            number: of the span.
            todo: numbers of the spans that are asked for, from this one on and in this order; the
                same in every call but for those before.
        """
        layers = set(self.spans[number])
        if not self.at_once:
            for batch in self.batches:
                for group, passes in self.stream.passes(batch, layers):
                    yield batch, group, passes
            return
        if self._sweep is None:
            chosen = {name for other in todo for name in self.spans[other]}
            self._sweep = self.stream.passes(self.batches[0], chosen)
        count = sum(
            any(piece.layer in layers for piece in group)
            for groups in self.stream.groups
            for group in groups
        )
        for group, passes in itertools.islice(self._sweep, count):
            yield self.batches[0], group, passes

    def energies(self, world: World) -> NDArray[np.float64]:
        """Return `Moments.energies`, by a sweep of its own that the processes of a world share."""
        count = sum(len(batch.observations) for batch in self.batches)
        sums = ShardedSums({ENERGIES: np.zeros(count)}, {}, None, world)
        starts = np.cumsum([0, *(len(batch.observations) for batch in self.batches)])
        for number in sums.share(range(len(self.batches))):
            for group, passes in self.stream.passes(self.batches[number]):
                # A layer that is cut into pieces is looked at with the first.
                names = [piece.layer for piece in group if piece.start == 0]
                for place, item in enumerate(passes, int(starts[number])):
                    sums.values[ENERGIES][place] += pass_energies(item, names)[0]
                    del item  # the next pass is made before the name is bound anew
        return sums.total()[ENERGIES]

    def moments(self, number: int, todo: Sequence[int]) -> Iterator[tuple[str, LayerMoments]]:
        """Yield each of a span's layers with its moments, in forward order."""
        layers = {name: self.stream.layers[name] for name in self.spans[number]}
        sums = moment_sums(layers, self.settings)
        for _, _, passes in self.groups(number, todo):
            add_passes(passes, sums)
        for name in layers:
            # What passes, and the layer before, left in the C library's hands.
            return_freed_memory()
            yield name, layer_moments(sums, name)


def add_passes(
    passes: Iterator[Pass] | GroupPasses, sums: Mapping[str, NDArray[np.float64]]
) -> None:
    """Add what passes say about the moments of their layers."""
    for item in passes:
        add_pass(item, sums)
        del item  # the next pass is made before the name is bound anew


def open_sweeps(
    policy: Policy,
    observations: Sequence[Observation],
    limits: StreamLimits,
    settings: MomentSettings,
    device: torch.device,
    use: SpanUse,
) -> SpanSweeps:
    """Find out how many observations go through a policy at once, and where they stop.

    Args:
        policy: its weights were left on disk.
        observations: at least one.
        limits: observations that run together where not all of them fit, probes, what is held
            beside a span's sums; the bound, or None for most of what this machine has left. Needs
            of layers are those of `use`.
        settings: blocks of moments, halved until they fit; seed of probes.
        device: where to compute.
        use: what is done with the moments.

    Raises:
        QvlaError: what is needed exceeds the bound.
    """
    layers, bound = traced_layers(policy), limits.max_bytes
    if bound is None and (left := available_bytes()) is not None:
        bound = int(_SHARE_OF_FREE * left)
    placement, unbounded = WeightPlacement.on(device), replace(limits, max_bytes=None)
    free = open_stream(policy, layers, observations, unbounded, placement)
    bounded = replace(limits, max_bytes=bound)
    while True:
        try:
            return _open(free, observations, bounded, settings, use)
        except QvlaError:
            if settings.largest_block <= SMALLEST_BLOCK:
                raise
            settings = replace(settings, largest_block=settings.largest_block // 2)


def _open(
    free: Stream,
    observations: Sequence[Observation],
    limits: StreamLimits,
    settings: MomentSettings,
    use: SpanUse,
) -> SpanSweeps:
    """Open sweeps of moments in blocks of a size, from a stream without a bound."""
    layers, count, bound = free.layers, len(observations), limits.max_bytes
    parts = [[piece.layer for group in part for piece in group] for part in free.groups]
    spans: list[Sequence[str]] = [list(dict.fromkeys(names)) for names in reversed(parts) if names]

    def sums_of(names: Collection[str]) -> int:
        return sum_bytes({name: layers[name] for name in names}, settings)

    def opened(size: int, room: int | None) -> Stream:
        """Open a stream whose sums are those of a part, or have a room of their own."""
        here = replace(limits, batch_size=size, needs_of=use.needs(settings, room is None))
        if room is not None:
            here = replace(here, held_bytes=limits.held_bytes + room)
        elif not use.by_group:
            here = replace(here, part_bytes=sums_of)
        return open_stream(free.policy, layers, observations, here, free.placement, free.needs)

    taken = [sums_of(names) for names in spans]
    tries = ways_to_go(count, limits.batch_size, max(taken), bound)
    for size, room in tries[:-1]:
        with contextlib.suppress(QvlaError):
            stream = opened(size, room)
            break
    else:
        size, room = tries[-1]
        stream = opened(size, room)
    if room is not None:
        spans = _joined(spans, taken, room)
    probes = Probes(limits.probes, settings.seed)
    batches = [
        ProbedBatch(observations[start : start + size], probes, number)
        for number, start in enumerate(range(0, count, size))
    ]
    return SpanSweeps(stream, batches, spans, settings)


def ways_to_go(
    count: int, batch_size: int, least: int, bound: int | None
) -> list[tuple[int, int | None]]:
    """Return how observations may go through a policy, what takes the least time first.

    Args:
        count: of the observations.
        batch_size: how many go together where not all do.
        least: bytes of the sums of the part that has most.
        bound: of memory.

    Returns:
        Observations that go together, and the room that the sums of a span get: None for those of
        a part or group of layers at a time.
    """
    size = min(batch_size, count)
    ways: list[tuple[int, int | None]] = [(count, None)]
    if bound is not None and size < count:
        ways += [(size, max(least, int(bound * _SHARE_OF_SUMS))), (size, least)]
    return ways


def _joined(spans: Sequence[Sequence[str]], taken: Sequence[int], room: int) -> list[Sequence[str]]:
    """Join spans that follow each other as far as their sums fit."""
    joined: list[list[str]] = []
    left = 0
    for names, nbytes in zip(spans, taken, strict=True):
        if not joined or nbytes > left:
            joined.append([])
            left = room
        # Forward order within a span.
        joined[-1] = [*names, *joined[-1]]
        left -= nbytes
    return list(joined)
