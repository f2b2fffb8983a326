"""What making compensated codes of a layer takes: memory, products, disk. numpy only."""

from dataclasses import dataclass

from qvla_export.quantizer.compensation import SECTION_CHANNELS
from qvla_export.quantizer.elimination import Elimination
from qvla_export.quantizer.moments import block_size

# For each pair of inputs, or of channels: while their moments are factored, and then.
_BYTES_PER_PAIR, _BYTES_PER_FACTORED = 30, 12
# For each weight of channels that answer each other, and of some that do not; of those that go
# through the inputs together, in numbers.
_BYTES_PER_WEIGHT, _BYTES_PER_WEIGHT_ALONE, _NUMBERS_PER_ROUNDED = 32, 24, 14


@dataclass(frozen=True)
class RoundingCost:
    """What rounding one layer takes."""

    # At the peak, its weights and moments included.
    memory_bytes: int
    # Codes and scales, as they lie in the file of codes.
    disk_bytes: int
    # Multiply-adds in products of float32, and in factors of float64.
    products: float
    factors: float
    # Steps of the loop over inputs, each of a few small array operations.
    steps: float


def rounding_cost(
    channels: int, inputs: int, largest_block: int, group_size: int | None = None
) -> RoundingCost:
    """Return what rounding a layer takes whose channels and inputs answer each other.

    Args:
        channels: of the layer.
        inputs: weights of a channel.
        largest_block: of its moments.
        group_size: inputs that share a scale; None for one scale a channel.
    """
    size = block_size(channels, largest_block)
    blocks, blocking = -(-channels // size), Elimination().blocking_of(channels)
    of_channels = _BYTES_PER_FACTORED * inputs**2 + _BYTES_PER_PAIR * size**2
    memory = max(alone_bytes(channels, inputs), of_channels)
    moments = 4 * (inputs * block_size(inputs, largest_block) + channels * size)
    groups = 1 if group_size is None else -(-inputs // group_size)
    waits = min(size, blocking.channels) // blocking.block - 1
    return RoundingCost(
        memory + _BYTES_PER_WEIGHT * channels * inputs + moments,
        channels * (inputs + 4 * groups),
        channels * inputs * (inputs + size) / 2,
        inputs**3 / 3 + blocks * size**3 / 3,
        channels / blocking.channels * inputs * (1 + waits / blocking.inputs),
    )


def alone_bytes(channels: int, inputs: int) -> int:
    """Return what rounding channels that do not answer each other takes beside their weights.

    Moments and factors of the inputs, and the channels on their way.
    """
    itemsize = 4 if Elimination().blocking_of(channels).is_single else 8
    together = min(channels, SECTION_CHANNELS) * inputs
    rounding = _BYTES_PER_FACTORED * inputs**2 + _NUMBERS_PER_ROUNDED * itemsize * together
    return max(_BYTES_PER_PAIR * inputs**2, rounding)


def alone_bytes_per_weight() -> int:
    """Return what each weight of channels that do not answer each other takes on its way."""
    return _BYTES_PER_WEIGHT_ALONE
