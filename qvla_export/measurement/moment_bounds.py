"""How moments are measured, what that takes, and blocks that fit into a bound of memory."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qvla_export.measurement.distributed import Alone, World
from qvla_export.measurement.layer_groups import LayerNeeds, passed_bytes
from qvla_export.measurement.stream_limits import StreamLimits, open_stream
from qvla_export.measurement.streamed import Stream
from qvla_export.measurement.weight_placement import WeightPlacement
from qvla_export.policies.base import Policy
from qvla_export.policies.layers import Layers, layer_shapes, traced_layers
from qvla_export.quantizer.moments import SHARES, block_size
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

# The largest blocks that fit are measured; smaller ones say too little of what weights share.
LARGEST_BLOCK, SMALLEST_BLOCK = 4096, 64


@dataclass(frozen=True)
class MomentSettings:
    """How to measure moments."""

    # Random signs over the action's numbers, of each observation.
    probes: int = 4
    seed: int = 0
    # Observations that run together; memory grows with it.
    batch_size: int = 8
    # Inputs or channels whose moments are kept together; of more, blocks along the diagonal. A
    # layer takes 8 * (inputs * block + channels * block) bytes while it is measured.
    largest_block: int = LARGEST_BLOCK
    # Of all that is in memory, for a policy whose weights were left on disk; None for no bound.
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if min(self.probes, self.batch_size, self.largest_block) < 1:
            raise QvlaError(f"probes, batch size and block must be at least 1, got {self}")

    def stated(self) -> dict[str, Any]:
        """Return what tells sums apart, as JSON; the bound of memory shows in the blocks."""
        # Sums of earlier versions counted observations by their squared gradients alone.
        stated = {**asdict(self), "shares": SHARES}
        del stated["max_bytes"]
        return stated


DEFAULT_MOMENTS = MomentSettings()


def moment_sums(layers: Layers, settings: MomentSettings) -> dict[str, NDArray[np.float64]]:
    """Return zeros for all that is summed."""
    empty: dict[str, NDArray[np.float64]] = {}
    for name, (channels, inputs) in layer_shapes(layers).items():
        empty |= {
            f"{name}/tokens": np.zeros(1),
            f"{name}/weight": np.zeros(1),
            f"{name}/weighted": np.zeros(inputs),
            f"{name}/inputs": _blocks(inputs, settings),
            f"{name}/channels": _blocks(channels, settings),
        }
    return empty


def _blocks(width: int, settings: MomentSettings) -> NDArray[np.float64]:
    size = block_size(width, settings.largest_block)
    return np.zeros((-(-width // size), size, size))


def open_moment_stream(
    policy: Policy,
    layers: Layers,
    observations: Sequence[Observation],
    settings: MomentSettings,
    world: World,
) -> Stream:
    """Return how batches go through a policy whose weights lie on disk.

    Raises:
        QvlaError: sums, and a part or one of its layers, need more than the bound.
    """
    sums = sum_bytes(layers, settings)
    # Partners' sums lie beside this process's own when they are added up.
    held = sums * (2 if world.size > 1 else 1)
    limits = StreamLimits(
        settings.batch_size,
        settings.probes,
        lambda some, moved: moment_needs(some, moved, settings),
        held,
        settings.max_bytes,
        cut=False,
    )
    return open_stream(policy, layers, observations, limits, WeightPlacement.on(world.device))


def fitting_block(
    policy: Policy,
    observations: Sequence[Observation],
    settings: MomentSettings,
    world: World | None = None,
) -> int:
    """Return the largest block whose sums fit into the bound beside a part of the policy.

    4096, or the half of it again and again, down to 64.

    Args:
        policy: its weights were left on disk.
        observations: all.
        settings: with the bound of memory; the block is not looked at.
        world: the processes that share the observations.

    Raises:
        QvlaError: blocks of 64 do not fit; says what is needed.
    """
    layers, size = traced_layers(policy), LARGEST_BLOCK
    while True:
        tried = replace(settings, largest_block=size)
        try:
            open_moment_stream(policy, layers, observations, tried, world or Alone())
        except QvlaError:
            if size <= SMALLEST_BLOCK:
                raise
            size //= 2
        else:
            return size


def moment_needs(
    layers: Layers, moved: Mapping[str, tuple[int, int]], settings: MomentSettings
) -> dict[str, LayerNeeds]:
    """Return what each layer takes in a pass: products, weighted tokens, patches."""
    needs = {}
    for name, numbers in moved.items():
        channels, inputs = layer_shapes({name: layers[name]})[name]
        patches = numbers[1] // channels * inputs
        block = max(block_size(width, settings.largest_block) for width in (channels, inputs))
        products = 4 * max(numbers[1], 3 * patches) + 12 * block**2
        needs[name] = LayerNeeds(
            channels,
            (replace(passed_bytes(channels, numbers), passes=products, passes_per_channel=0),),
        )
    return needs


def sum_bytes(layers: Layers, settings: MomentSettings) -> int:
    """Return what the sums of some layers take."""
    return sum(array.nbytes for array in moment_sums(layers, settings).values())
