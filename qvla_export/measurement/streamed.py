"""First order in the memory of one part: weights come from disk, forward once and back once.

The forward pass keeps what goes from part to part. The backward pass takes the parts in reverse,
runs each again from what it was given, now with a graph, and hands the gradients of the action on:
one for each probe, the same that a pass over the whole policy would bring there.
"""

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qvla_export.measurement.backward import (
    Pass,
    ProbedBatch,
    Recorded,
    WeightChanges,
)
from qvla_export.measurement.layer_groups import (
    Piece,
)
from qvla_export.measurement.part_needs import PartNeeds
from qvla_export.measurement.part_reader import PartReader, Weights
from qvla_export.measurement.raised_weights import put_weight
from qvla_export.measurement.recorded_calls import recording
from qvla_export.measurement.weight_placement import WeightPlacement
from qvla_export.measurement.whole_deviations import WholeDeviations
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers
from qvla_export.shared.allocator import return_freed_memory
from qvla_export.shared.observation import Observation

# Layers, or channels of them, that are measured together -> what each width adds to their weights.
ChangesOf = Callable[[Sequence[Piece]], WeightChanges]


@dataclass(frozen=True)
class Stream:
    """How batches go through a policy whose weights lie on disk; see `stream_limits`."""

    policy: Policy
    layers: Layers
    placement: WeightPlacement
    needs: Sequence[PartNeeds]
    # Layers of each part, in groups that are measured together.
    groups: Sequence[Sequence[Sequence[Piece]]]
    # Of each part, whether it fits beside what a neighbour takes: it is read while that computes.
    ahead: Sequence[bool]
    # All that is in memory at any time, as it was counted.
    peak_bytes: int

    def passes(
        self, batch: ProbedBatch, chosen: Collection[str] | None = None
    ) -> "Generator[tuple[Sequence[Piece], GroupPasses]]":
        """Run a batch forward, then back; yield each group with a pass of every observation.

        The passes are in the order of the observations, and have to be gone through once at least.

        Args:
            batch: observations and probes.
            chosen: layers to stop at, names; None for all.
        """
        device = self.placement.device
        runs = [_Run(model_inputs(self.policy, item, device)) for item in batch.observations]
        parts = [_some(groups, chosen) for groups in self.groups]
        first = next((number for number, groups in enumerate(parts) if any(groups)), len(parts))
        if chosen is None:
            first = 0
        back = list(zip(self.needs, parts, strict=True))[first:][::-1]
        with self.placement.computing(self.policy), self._reader(first) as reader:
            self._forward(runs, reader)
            weights = self._draw(batch, runs)
            for needs, groups in back:
                with weights_in_memory(self.policy, reader.take(), device):
                    for number, group in enumerate(groups or [()]):
                        passes = GroupPasses(self.layers, needs, group, runs, weights, number == 0)
                        if chosen is not None and not group:
                            passes.hand_on_only()
                        else:
                            yield group, passes
                for run in runs:
                    del run.values[needs.part.output], run.gradients[needs.part.output]

    def _reader(self, first: int) -> PartReader:
        """Return what reads all parts forward, then back to the first that is asked for."""
        # A part may be read while its neighbour is in memory.
        order = [*self.needs, *self.needs[first:][::-1]]
        ahead = [*self.ahead, *self.ahead[first:][::-1]]
        read = self.placement.reader(self.policy)
        return PartReader(read, [needs.reads for needs in order], ahead)

    def _forward(self, runs: "Sequence[_Run]", reader: PartReader) -> None:
        """Run every observation through all parts, without a graph."""
        for needs in self.needs:
            weights = reader.take()
            with weights_in_memory(self.policy, weights, self.placement.device), torch.no_grad():
                for run in runs:
                    run.values[needs.part.output] = run.through(needs)

    def _draw(self, batch: ProbedBatch, runs: "Sequence[_Run]") -> list[float]:
        """Draw the probes, which are what the gradients begin with; return their weights."""
        last = self.needs[-1].part.output
        flat = torch.cat([run.values[last].reshape(1, -1) for run in runs])
        probes, weight = batch.draw(flat)
        for number, run in enumerate(runs):
            shape = run.values[last].shape
            run.gradients[last] = [probe[number].reshape(shape) for probe in probes]
        return [weight] * len(probes)

    def add_batch(
        self, batch: ProbedBatch, changes_of: ChangesOf, sums: Mapping[str, NDArray[np.float64]]
    ) -> None:
        """Add the squared deviations of all layers on a batch to sums; see `backward.add_batch`."""
        whole = WholeDeviations(self.layers, batch, sums)
        for group, passes in self.passes(batch):
            whole.add(group, passes, changes_of(group))


def _some(
    groups: Sequence[Sequence[Piece]], chosen: Collection[str] | None
) -> list[Sequence[Piece]]:
    """Return groups of chosen layers, the others left out."""
    if chosen is None:
        return list(groups)
    kept = [[piece for piece in group if piece.layer in chosen] for group in groups]
    return [group for group in kept if group]


@dataclass
class GroupPasses:
    """A pass of each observation of a batch through a part; each iteration runs them anew."""

    layers: Layers
    needs: PartNeeds
    group: Sequence[Piece]
    runs: "Sequence[_Run]"
    weights: Sequence[float]
    # Whether the gradients of what earlier parts made are still to be kept.
    hand_on: bool

    def __iter__(self) -> Iterator[Pass]:
        """Yield the passes, one after another."""
        layers = {piece.layer: self.layers[piece.layer] for piece in self.group}
        channels = {piece.layer: piece.channels for piece in self.group}
        hand_on, self.hand_on = self.hand_on, False
        for run in self.runs:
            yield run.back(self.needs, layers, channels, self.weights, hand_on)

    def hand_on_only(self) -> None:
        """Run the passes for the sake of earlier parts."""
        for item in self:
            for number in range(len(self.weights)):
                item.gradients(number)


@dataclass
class _Run:
    """One observation on its way through the parts and back."""

    # Model inputs, and outputs of parts.
    values: dict[str, Tensor]
    # Output of a part -> gradient of each probe's action.
    gradients: dict[str, list[Tensor]] = field(default_factory=dict)

    def through(self, needs: PartNeeds) -> Tensor:
        """Return a part's output."""
        output: Tensor = needs.part.module(*(self.values[name] for name in needs.part.inputs))
        return output

    def back(
        self,
        needs: PartNeeds,
        group: Layers,
        channels: Mapping[str, slice],
        weights: Sequence[float],
        hand_on: bool,
    ) -> Pass:
        """Run a part with a graph.

        Args:
            needs: the part.
            group: layers to record.
            channels: of these layers, that are asked for.
            weights: of the probes.
            hand_on: keep the gradients of what earlier parts made as well.
        """
        given = {name: self.values[name].detach() for name in needs.part.inputs}
        sources = needs.made_by_others if hand_on else ()
        for name in sources:
            given[name].requires_grad_(True)
        with recording(group) as calls, torch.enable_grad():
            result = needs.part.module(*given.values())
        upstream = self.gradients[needs.part.output]
        own = len(calls.targets)
        targets = [*calls.targets, *(given[name] for name in sources)]

        def gradients(number: int) -> Sequence[Tensor]:
            if not targets:
                return ()
            more = number + 1 < len(upstream)
            found = torch.autograd.grad(
                result, targets, grad_outputs=upstream[number], retain_graph=more
            )
            for name, gradient in zip(sources, found[own:], strict=True):
                # Each output has one reader.
                self.gradients.setdefault(name, []).append(gradient)
            return calls.joined(found[:own])

        inputs, outputs = calls.joined_inputs(), calls.joined_outputs()
        return Pass(Recorded(group, inputs, outputs, 1, channels), gradients, weights)


@contextlib.contextmanager
def weights_in_memory(policy: Policy, weights: Weights, device: torch.device) -> Iterator[None]:
    """Hold some weights of a policy in memory while the block runs.

    Args:
        policy: its weights were left on disk.
        weights: parameters and buffers by name; used up, so that none is there twice.
        device: where to put them.
    """
    replaced: list[tuple[str, Tensor]] = []
    try:
        for name in list(weights):
            replaced.append((name, put_weight(policy.module, name, weights.pop(name).to(device))))
        yield
    finally:
        for name, empty in replaced:
            put_weight(policy.module, name, empty)
        return_freed_memory()


def model_inputs(
    policy: Policy, observation: Observation, device: torch.device
) -> dict[str, Tensor]:
    """Return what a policy takes of an observation, on a device."""
    feeds = policy.processor.feeds(observation)
    return {name: torch.from_numpy(value).to(device) for name, value in feeds.items()}
