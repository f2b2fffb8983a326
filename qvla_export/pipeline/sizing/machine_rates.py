"""How fast this machine is at what a deployment is made of, measured in a second or two."""

import hashlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from qvla_export.quantizer.rounding_costs import Rates, measured_rates

# More numbers than caches hold, as a pass leaves them behind.
_DIGESTED_BYTES, _NUMBERS = 32_000_000, 1 << 22


@dataclass(frozen=True)
class MachineRates:
    """Rates of one CPU second."""

    # What rounding is made of.
    rounding: Rates
    # Multiply-adds of a policy's own products, in torch.
    products_per_s: float
    # Numbers that elementwise operations put out.
    numbers_per_s: float
    # Bytes that are read or written with their digest.
    bytes_per_s: float


def measure_machine(tokens: int, inputs: int, channels: int) -> MachineRates:
    """Measure this machine in CPU time; others that share its cores and caches make it slower.

    Args:
        tokens: rows of the product that is timed: those of a batch in the policy's usual layer.
        inputs: of that layer.
        channels: of that layer.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    fed = torch.randn(tokens, inputs, generator=generator)
    weight = torch.randn(channels, inputs, generator=generator)
    content = bytes(_DIGESTED_BYTES)
    with torch.no_grad():
        moved = torch.randn(_NUMBERS, generator=generator)
        numbers_s = cpu_seconds(lambda: torch.nn.functional.gelu(moved))
        product_s = cpu_seconds(lambda: torch.nn.functional.linear(fed, weight))
    return MachineRates(
        measured_rates(),
        tokens * inputs * channels / product_s,
        _NUMBERS / numbers_s,
        _DIGESTED_BYTES / cpu_seconds(lambda: hashlib.sha256(content).digest()),
    )


def cpu_seconds(work: Callable[[], object]) -> float:
    """Return the CPU seconds of a piece of work, all threads together: the median of three."""
    taken = []
    for _ in range(3):
        began = time.process_time()
        work()
        taken.append(time.process_time() - began)
    return max(statistics.median(taken), 1e-6)
