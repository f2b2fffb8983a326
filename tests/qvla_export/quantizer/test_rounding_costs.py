"""What rounding is said to take: memory that is enough, seconds that add up."""

import tracemalloc
from dataclasses import asdict

import numpy as np
import pytest

from engines.targets import CPU
from qvla_export.quantizer.compensation import round_layer
from qvla_export.quantizer.moments import LayerMoments
from qvla_export.quantizer.quantize import compensated_spec
from qvla_export.quantizer.rounding_costs import Rates, measured_rates, rounding_cost


@pytest.mark.parametrize("shape", [(300, 700), (600, 900), (1100, 300)])
def test_rounding_takes_no_more_memory_than_is_said_and_not_much_less(
    shape: tuple[int, int],
) -> None:
    """numpy's arrays, which tracemalloc sees; weights and moments are there before."""
    channels, inputs = shape
    rows = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    moments = LayerMoments(
        np.ones(inputs, np.float32),
        np.eye(inputs, dtype=np.float32)[None],
        np.eye(channels, dtype=np.float32)[None],
    )
    widths = np.full(channels, 4, np.int8)
    tracemalloc.start()
    try:
        made = round_layer(rows, widths, compensated_spec(CPU), moments, np.arange(inputs))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    peak += rows.nbytes + moments.inputs.nbytes + moments.channels.nbytes
    cost = rounding_cost(channels, inputs, 4096, 64)
    assert 0.7 * cost.memory_bytes < peak < 1.15 * cost.memory_bytes
    assert made.codes.nbytes + made.scales.nbytes == cost.disk_bytes


def test_seconds_are_those_of_what_is_done() -> None:
    rates = measured_rates()
    assert min(asdict(rates).values()) > 0
    cost = rounding_cost(11008, 4096, 4096, 128)
    # Blocks of 3670 channels: the products of whole rows of G are left out.
    assert cost.products == 11008 * 4096 * (4096 + 3670) / 2
    assert cost.cpu_s(Rates(cost.products, cost.factors, cost.steps, 1.0, cost.weights)) == 4
    narrow = rounding_cost(512, 256, 4096, 64)
    assert narrow.narrow
    assert not cost.narrow
    assert narrow.cpu_s(Rates(1.0, 1.0, 1.0, narrow.steps, 1.0)) == 1
    assert cost.cpu_s(rates) > rounding_cost(4096, 4096, 4096, 128).cpu_s(rates) > 0
