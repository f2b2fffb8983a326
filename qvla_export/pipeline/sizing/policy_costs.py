"""What one observation costs in a policy: multiply-adds, bytes; found without computing it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qvla_export.pipeline.policy_source import PolicySource, open_checkpoint

if TYPE_CHECKING:
    from qvla_export.measurement.part_needs import PartNeeds
    from qvla_export.policies.base import Policy


@dataclass(frozen=True)
class LayerCosts:
    """A quantizable layer and what one observation moves through it."""

    name: str
    channels: int
    inputs: int
    tokens: int
    numbers_in: int

    @property
    def weights(self) -> int:
        """Return the number of its weights."""
        return self.channels * self.inputs

    @property
    def products(self) -> int:
        """Return the multiply-adds of one observation."""
        return self.tokens * self.weights


@dataclass(frozen=True)
class PartCosts:
    """One of a policy's smallest parts."""

    layers: tuple[LayerCosts, ...]
    # Of its weights as float32.
    weight_bytes: int
    # Of one observation: a pass forward and back, and what goes on to other parts.
    pass_bytes: int
    output_bytes: int


@dataclass(frozen=True)
class PolicyCosts:
    """A policy, by its parts."""

    parts: tuple[PartCosts, ...]
    # Numbers that reach the action; in all, unused ones as well.
    graph_numbers: int
    stored_numbers: int
    # Of one observation: the model's inputs, the action chunk.
    feed_bytes: int
    action_numbers: int

    @property
    def layers(self) -> tuple[LayerCosts, ...]:
        """Return all layers, in forward order."""
        return tuple(layer for part in self.parts for layer in part.layers)

    @property
    def products(self) -> int:
        """Return the multiply-adds of one observation, forward."""
        return sum(layer.products for layer in self.layers)

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of all weights as float32."""
        return 4 * self.stored_numbers

    @property
    def usual_layer(self) -> LayerCosts:
        """Return the layer below which half of the multiply-adds lie."""
        behind = 0
        ordered = sorted(self.layers, key=lambda layer: layer.products)
        for layer in ordered:
            behind += layer.products
            if 2 * behind >= self.products:
                return layer
        return ordered[-1]


def policy_costs(source: PolicySource, policy: "Policy") -> PolicyCosts:
    """Return what one observation costs.

    Args:
        source: of the policy.
        policy: as it is held.

    Raises:
        QvlaError: the policy's family cannot be opened with its weights on disk.
    """
    from qvla_export.measurement.part_needs import part_needs
    from qvla_export.pipeline.resources import can_stay_on_disk
    from qvla_export.policies.layers import layer_shapes, traced_layers, weights_on_disk
    from qvla_export.shared.errors import QvlaError

    if not can_stay_on_disk(source):
        raise QvlaError(
            "--plan-only sizes policies whose weights can stay on disk, and this one's family is "
            "read as a whole; leave it out"
        )
    stored = policy
    if not weights_on_disk(policy):
        place = Path(source.place), source.unnorm_key, source.preset
        stored = open_checkpoint(*place, resident=False)
    parts = stored.parts(1)
    outputs = {part.output for part in parts}
    feeds = {n: t for part in parts for n, t in part.inputs.items() if n not in outputs}
    layers = traced_layers(stored)
    needs = part_needs(stored, layers, feeds)
    named = {name: value.numel() for name, value in stored.module.state_dict().items()}
    read = {name for need in needs for name in need.reads if name in named}
    spec = stored.processor.spec
    return PolicyCosts(
        _parts(needs, layer_shapes(layers)),
        sum(named[name] for name in read),
        sum(named.values()),
        sum(tensor.nbytes for tensor in feeds.values()),
        spec.horizon * spec.action_dim,
    )


def _parts(
    needs: "Sequence[PartNeeds]", shapes: Mapping[str, tuple[int, int]]
) -> tuple[PartCosts, ...]:
    return tuple(
        PartCosts(
            tuple(
                LayerCosts(name, *shapes[name], numbers_out // shapes[name][0], numbers_in)
                for name, (numbers_in, numbers_out) in need.moved.items()
            ),
            need.weight_bytes,
            need.pass_bytes,
            need.output_bytes,
        )
        for need in needs
    )
