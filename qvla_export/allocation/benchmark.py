"""Time, memory and gap of allocations on a random table of a published policy's size. numpy only.

The table stands for no policy: what is measured depends on its size, hardly on its numbers.
"""

import multiprocessing
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection

import numpy as np

from qvla_export.allocation.allocate import Budget, allocate_bits, find_allocator, least_error
from qvla_export.latency_model.published_sizes import find_geometry
from qvla_export.measurement.peak_memory import high_water_bytes
from qvla_export.quantizer.quantize import spec_for
from qvla_export.sensitivity.sensitivities import Sensitivities
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import Target

# Sensitivity of a middling channel at each width.
_TYPICAL = {0: 1.0, 2: 0.3, 4: 0.02, 8: 1e-4}


@dataclass(frozen=True)
class AllocationBench:
    """What is allocated, by what."""

    geometry: str
    method: str
    budget: Budget
    target: Target
    rounds: int = 3
    seed: int = 0


@dataclass(frozen=True)
class AllocationFigures:
    """What one method took and reached, measured in a process of its own."""

    method: str
    channels: int
    # Whole calls, from table to plan.
    seconds: tuple[float, ...]
    # Peak resident memory of the process: interpreter, libraries and table included.
    peak_bytes: int
    expected_error: float
    # Optimum of the linear relaxation.
    least_error: float

    @property
    def gap(self) -> float:
        """How far above the bound the error is, relatively."""
        return self.expected_error / self.least_error - 1


def random_table(geometry: str, target: Target, seed: int = 0) -> Sensitivities:
    """Return sensitivities of a published policy's size, lognormal around what is typical.

    Raises:
        QvlaError: the geometry is unknown.
    """
    generator = np.random.default_rng(seed)
    typical = np.array(list(_TYPICAL.values()), np.float32)[:, None]
    values, inputs = {}, {}
    for name, (channels, weights) in find_geometry(geometry).layers.items():
        spread = generator.lognormal(0, 2, (1, channels)).astype(np.float32)
        single = generator.lognormal(0, 0.3, (len(typical), channels)).astype(np.float32)
        values[name], inputs[name] = typical * spread * single, weights
    return Sensitivities(
        values=values,
        widths=tuple(_TYPICAL),
        weights_per_channel=inputs,
        method="random",
        samples=1,
        probes=0,
        policy_digest="0" * 64,
        calibration_digest="0" * 64,
        quantizer=spec_for(target),
    )


def measure_allocation(bench: AllocationBench) -> AllocationFigures:
    """Allocate in a process of its own, so that its peak memory is its own.

    Raises:
        QvlaError: the method or geometry is unknown, the budget cannot be met.
    """
    find_allocator(bench.method)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(bench, sender))
    process.start()
    sender.close()
    try:
        found: AllocationFigures | QvlaError = receiver.recv()
    except EOFError:
        process.join()
        raise QvlaError(f"{bench.method} ended with exit code {process.exitcode}") from None
    process.join()
    if isinstance(found, QvlaError):
        raise found
    return found


def _child(bench: AllocationBench, sender: Connection) -> None:
    try:
        sender.send(_measure(bench, time.perf_counter))
    except QvlaError as error:
        sender.send(error)


def _measure(bench: AllocationBench, clock: Callable[[], float]) -> AllocationFigures:
    table = random_table(bench.geometry, bench.target, bench.seed)
    allocator, seconds = find_allocator(bench.method), []
    for _ in range(bench.rounds):
        start = clock()
        plan = allocate_bits(table, bench.budget, bench.target, method=allocator)
        seconds.append(clock() - start)
    peak_bytes = high_water_bytes()
    assert plan.expected_error is not None
    return AllocationFigures(
        method=bench.method,
        channels=sum(len(widths) for widths in plan.widths.values()),
        seconds=tuple(seconds),
        peak_bytes=peak_bytes,
        expected_error=plan.expected_error,
        least_error=least_error(table, bench.budget, bench.target),
    )
