"""`StreamLimits`, and what they make of a policy: groups of layers that fit into memory."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch

from qvla_export.measurement.layer_groups import NeedsOf, fitting_groups, group_bytes, too_small
from qvla_export.measurement.part_needs import PartNeeds, part_needs
from qvla_export.measurement.streamed import Stream, model_inputs
from qvla_export.measurement.weight_placement import WeightPlacement
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class StreamLimits:
    """What goes through a policy at once, and the memory that it may take."""

    # Observations that go through together.
    batch_size: int
    # Of an observation; None for one of each number of the action chunk.
    probes: int | None
    # Layers and how many numbers a pass moves -> what each layer needs.
    needs_of: NeedsOf
    # Sums and whatever else stays in memory.
    held_bytes: int
    # Bound of all that is in memory; None for one group a part.
    max_bytes: int | None
    # Whether a layer may be cut into its channels.
    cut: bool = True
    # Names of a part's layers -> what else is held while they are measured.
    part_bytes: Callable[[Collection[str]], int] = lambda names: 0


def open_stream(
    policy: Policy,
    layers: Layers,
    observations: Sequence[Observation],
    limits: StreamLimits,
    placement: WeightPlacement,
    needs: Sequence[PartNeeds] = (),
) -> Stream:
    """Find what every part needs and cut its layers into groups that fit.

    At any time there are: what is held throughout; what goes from part to part, of a batch; the
    gradients of each probe there; one part's weights; of one observation, all that the part
    makes; what a group of its layers needs. Where there is room, also the next part's weights.

    Args:
        policy: its weights were left on disk.
        layers: of the policy.
        observations: all; the longest prompt counts.
        limits: what goes through at once, and the bound of memory.
        placement: where to compute, and the type of the weights there.
        needs: of the parts, where they were found before.

    Raises:
        QvlaError: a part, or a small piece of one of its layers, needs more than the bound.
    """
    longest = max(observations, key=lambda o: len(policy.processor.prompt_ids(o)))
    feeds = model_inputs(policy, longest, torch.device("cpu"))
    needs = needs or part_needs(policy, layers, feeds)
    probes = limits.probes
    if probes is None:
        probes = policy.processor.spec.horizon * policy.processor.spec.action_dim
    # Of the batch: inputs, gradients of a part's output and of its own inputs.
    moving = sum(tensor.nbytes for tensor in feeds.values())
    moving += 2 * probes * max(n.output_bytes for n in needs)
    bound = limits.max_bytes
    groups, forward, back = [], [], []
    for n in needs:
        moving += n.output_bytes
        held = limits.held_bytes + limits.batch_size * moving
        forward.append(held + n.weight_bytes + n.made_bytes)
        held += limits.part_bytes(n.moved)
        beside = held + n.weight_bytes
        if bound is not None and beside + n.pass_bytes > bound:
            needed = beside + n.pass_bytes
            raise QvlaError(
                f"part {n.part.name} needs {needed / 1e9:.4g} GB: weights "
                f"{n.weight_bytes / 1e9:.3g}, activations {n.pass_bytes / 1e9:.3g}, sums and what "
                f"goes between parts {held / 1e9:.3g}; {too_small(needed, bound)}"
            )
        of_layers = limits.needs_of(layers, n.moved)
        cut = fitting_groups(of_layers, bound, beside, limits.cut, n.pass_bytes)
        groups.append(cut)
        back.append(beside + max(group_bytes(of_layers, group, n.pass_bytes) for group in cut))
    ahead = _read_ahead(needs, forward, back, bound)
    return Stream(
        policy, layers, placement, needs, groups, ahead, _peak(needs, forward, back, ahead)
    )


def _read_ahead(
    needs: Sequence[PartNeeds], forward: Sequence[int], back: Sequence[int], bound: int | None
) -> list[bool]:
    """Return whether each part's weights fit beside what the part takes that runs before it."""

    def fits(number: int) -> bool:
        beside = [*forward[:number][-1:], *back[number + 1 :][:1]]
        return bound is None or max(beside, default=0) + needs[number].weight_bytes <= bound

    return [fits(number) for number in range(len(needs))]


def _peak(
    needs: Sequence[PartNeeds],
    forward: Sequence[int],
    back: Sequence[int],
    ahead: Sequence[bool],
) -> int:
    """Return the most that is in memory at any time, with the weights that are read ahead."""
    weights = [n.weight_bytes if early else 0 for n, early in zip(needs, ahead, strict=True)]
    # The part after, forward; the one before, on the way back.
    there = [a + b for a, b in zip(forward, [*weights[1:], 0], strict=True)]
    return max(*there, *(a + b for a, b in zip(back, [0, *weights[:-1]], strict=True)))
