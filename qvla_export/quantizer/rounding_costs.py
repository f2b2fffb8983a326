"""What making compensated codes of a layer takes: memory, arithmetic, disk. numpy only."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from qvla_export.quantizer.arrays import NumpyArrays
from qvla_export.quantizer.compensation import round_layer
from qvla_export.quantizer.elimination import Blocking, Elimination, Levels, eliminate
from qvla_export.quantizer.layer_work import SECTION_CHANNELS
from qvla_export.quantizer.moments import LayerMoments, block_size
from qvla_export.quantizer.quantize import QuantizerSpec, WidthRule
from qvla_export.quantizer.scale_search import searched_steps
from qvla_export.quantizer.shares import Shares

# For each pair of inputs, or of channels, while their moments are factored: in float32 in place.
_BYTES_PER_PAIR = {4: 5, 8: 24}
# For each weight of channels that do not answer each other; of those that go through the inputs
# together, in numbers.
_BYTES_PER_WEIGHT_ALONE, _NUMBERS_PER_ROUNDED = 24, 14
# Of wide layers, whose steps are timed.
_WIDE_BLOCKING = Elimination().blocking_of(4096)


@dataclass(frozen=True)
class Rates:
    """How fast one core is at what rounding is made of."""

    # Multiply-adds of float32 in products, and in Cholesky factors.
    products_per_s: float
    factors_per_s: float
    # Steps of the loop over inputs, on 256 channels; of narrow layers, all else included.
    steps_per_s: float
    narrow_steps_per_s: float
    # Weights whose scales are searched.
    weights_per_s: float


@dataclass(frozen=True)
class RoundingCost:
    """What rounding one layer takes."""

    # At the peak, its weights and moments included.
    memory_bytes: int
    # Codes and scales, as they lie in the file of codes.
    disk_bytes: int
    # Multiply-adds in products, and in factors.
    products: float
    factors: float
    # Steps of the loop over inputs, and whether they are of a narrow layer.
    steps: float
    narrow: bool
    # Weights whose scales are searched.
    weights: int

    def cpu_s(self, rates: Rates) -> float:
        """Return the CPU seconds of one core."""
        if self.narrow:
            return self.steps / rates.narrow_steps_per_s
        return (
            self.products / rates.products_per_s
            + self.factors / rates.factors_per_s
            + self.steps / rates.steps_per_s
            + self.weights / rates.weights_per_s
        )


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
    size, blocking = block_size(channels, largest_block), Elimination().blocking_of(channels)
    blocks, weights, number = -(-channels // size), channels * inputs, _itemsize(channels)
    # The weights, and what they are to be; moments of the inputs, then of the channels, factored.
    both, answers = (4 + number) * weights, number * inputs**2
    together = _NUMBERS_PER_ROUNDED * blocking.channels * inputs + 2 * size * inputs + size**2
    together += _numbers_of_runs(blocking, inputs)
    memory = max(
        both + _BYTES_PER_PAIR[number] * inputs**2,
        both + answers + _BYTES_PER_PAIR[number] * size**2,
        both + answers + weights + number * together,
    )
    moments = 4 * (inputs * block_size(inputs, largest_block) + channels * size)
    groups = 1 if group_size is None else -(-inputs // group_size)
    waits = min(size, blocking.channels) // blocking.block - 1
    return RoundingCost(
        memory + moments,
        channels * (inputs + 4 * groups),
        weights * (inputs + size) / 2,
        inputs**3 / 3 + blocks * size**3 / 3,
        channels / blocking.channels * inputs * (1 + waits * blocking.inputs / blocking.panel),
        blocking.channels < _WIDE_BLOCKING.channels,
        weights,
    )


def measured_rates() -> Rates:
    """Measure this machine's rates: a second, in CPU time of one thread's work."""
    generator, arrays = np.random.default_rng(0), NumpyArrays()
    matrix = generator.standard_normal((1024, 1024), dtype=np.float32)
    positive = matrix @ matrix.T + 1024 * np.eye(1024, dtype=np.float32)
    groups = matrix[:256].reshape(256, -1, 64)
    return Rates(
        1024**3 / _cpu_s(lambda: matrix @ matrix),
        1024**3 / 3 / _cpu_s(lambda: arrays.factor(positive)),
        _wide_steps_per_s(matrix[:512, :512]),
        _narrow_steps_per_s(matrix[:256, :256]),
        groups.size / _cpu_s(lambda: searched_steps(groups, 4, 16, None, False)),
    )


def _wide_steps_per_s(rows: Any) -> float:
    """Return the steps of a CPU second in the loop over 512 inputs.  rows float32 [512, 512]"""
    levels, arrays = Levels(np.ones((512, 256), np.float32), -8.0, 7.0), NumpyArrays()
    upper = np.triu(rows / 1024) + np.eye(512, dtype=np.float32)
    shares, of_channels = Shares(upper + 0, arrays), upper[:256, :256]
    targets = rows[:, : _WIDE_BLOCKING.channels]
    # Of 512 inputs, 16 blocks of channels that wait for each other 16 inputs each.
    run = _cpu_s(lambda: eliminate(targets, levels, shares, of_channels, arrays, _WIDE_BLOCKING))
    return (512 + 15 * 16) / run


def _narrow_steps_per_s(rows: Any) -> float:
    """Return the steps of a CPU second of a whole layer, whose blocks cost more than their steps.

    Args:
        rows: float32 [256, 256].
    """
    spec = QuantizerSpec(
        {4: WidthRule(64, "mse", 16)}, weighted_scales=True, compensation="inputs and channels"
    )
    square = (rows @ rows.T / 256 + np.eye(256, dtype=np.float32))[None]
    moments = LayerMoments(np.zeros(256, np.float32), square, square)
    widths, order = np.full(256, 4, np.int8), np.arange(256)
    run = _cpu_s(lambda: round_layer(rows, widths, spec, moments, order))
    return rounding_cost(256, 256, 256, 64).steps / run


def alone_bytes(channels: int, inputs: int) -> int:
    """Return what rounding channels that do not answer each other takes beside their weights.

    Moments and factors of the inputs, and the channels on their way.
    """
    number, blocking = _itemsize(channels), Elimination().blocking_of(channels)
    rounded = _NUMBERS_PER_ROUNDED * min(channels, SECTION_CHANNELS) * inputs
    together = inputs**2 + rounded + _numbers_of_runs(blocking, inputs)
    return max(_BYTES_PER_PAIR[number] * inputs**2, number * together)


def _numbers_of_runs(blocking: Blocking, inputs: int) -> int:
    """Return the numbers of the inputs' shares, run by run."""
    return inputs * (min(blocking.panel, inputs) + blocking.inputs * blocking.block)


def alone_bytes_per_weight() -> int:
    """Return what each weight of channels that do not answer each other takes on its way."""
    return _BYTES_PER_WEIGHT_ALONE


def _itemsize(channels: int) -> int:
    return np.dtype(Elimination().blocking_of(channels).dtype).itemsize


def _cpu_s(run: Callable[[], Any]) -> float:
    """Return the CPU seconds of one run, the median of three."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        run()
        taken.append(time.process_time() - began)
    return max(statistics.median(taken), 1e-9)
