"""Measure what this machine's CPU makes of the products of a policy under ONNX Runtime."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvla_export.latency_model.kernel_rates import DeviceRates


def measure_rates(output: Path, threads: int | None = None) -> "DeviceRates":
    """Time probes for half a minute; write the rates and return them.

    Args:
        output: JSON file, for the option --rates of other commands.
        threads: of one operator; None for one a physical core.

    Raises:
        QvlaError: a probe that the rates need is missing.
    """
    from engines.bench.cpu_rates import measure_cpu_rates
    from engines.targets import find_target
    from qvla_export.graph.probe_graphs import probe_graphs

    rates = measure_cpu_rates(probe_graphs(find_target("cpu")), threads)
    rates.save(output)
    return rates
