"""`qvla bench allocation`: a table of a published size, each method in a process of its own."""

import subprocess
import sys

import numpy as np
import pytest

from engines.targets import CPU
from qvla_export.allocation.allocate import Budget
from qvla_export.allocation.benchmark import AllocationBench, measure_allocation, random_table
from qvla_export.latency_model.published_sizes import find_geometry
from qvla_export.shared.errors import QvlaError

BUDGET = Budget("bits per channel", 4.0)


def test_the_table_has_every_channel_of_the_policy() -> None:
    table = random_table("openvla-7b", CPU, seed=1)
    shapes = {n: (v.shape[1], table.weights_per_channel[n]) for n, v in table.values.items()}
    assert shapes == find_geometry("openvla-7b").layers
    assert sum(channels for channels, _ in shapes.values()) == 1_835_680
    assert table.digest == random_table("openvla-7b", CPU, seed=1).digest


def test_what_the_other_process_refuses_is_said_here() -> None:
    with pytest.raises(QvlaError, match="geometry 'openvla-8b' is unknown"):
        measure_allocation(AllocationBench("openvla-8b", "hull", BUDGET, CPU))
    with pytest.raises(QvlaError, match="the method must be one of"):
        measure_allocation(AllocationBench("openvla-7b", "lp", BUDGET, CPU))


def test_a_process_does_not_count_what_the_one_before_it_had() -> None:
    held = np.ones(50_000_000)
    line = "from qvla_export.measurement import peak_memory as m; print(m.high_water_bytes())"
    told = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert 0 < int(told.stdout) < held.nbytes / 2


@pytest.mark.slow
@pytest.mark.parametrize(("method", "most"), [("hull", 1e-4), ("algorithm1", 0.01)])
def test_a_7b_policy_is_allocated_close_to_the_bound_within_a_gigabyte(
    method: str, most: float
) -> None:
    found = measure_allocation(AllocationBench("openvla-7b", method, BUDGET, CPU, rounds=1))
    assert found.channels == 1_835_680
    assert -1e-9 <= found.gap < most
    assert found.peak_bytes < 1e9
    assert len(found.seconds) == 1
