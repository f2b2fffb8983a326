"""Measure what ONNX Runtime makes of this machine's CPU, in half a minute."""

import time
from collections.abc import Sequence

import numpy as np
import onnxruntime

from engines.ort import ort_options
from qvla_export.latency_model.kernel_rates import DeviceRates, KernelRates, Probe
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.target import PowerMode

# Enough rows that multiplications decide, few enough that a run ends before a busy machine
# interrupts it.
_ROWS = 64
_REPEATS = 30
_FLOAT_BITS = 32
# Fitted on the float reference policy; its graph has 5 operators a product that do more than
# reshape, of which some pass over smaller numbers.
_KERNELS_BETWEEN = 3
# Predicted over measured time of the reference policy, CPU time of one thread, rates measured
# directly before, several times (2026-11): float 1.02 to 1.23 (fitted), 8 mean bits 0.88, 4 mean
# bits 0.83 to 0.94, 2 mean bits 0.90, 8-bit weights and activations 0.67 to 0.83.
_UNCERTAINTY, _INT8_UNCERTAINTY = 1.5, 2.0


def measure_cpu_rates(probes: Sequence[Probe], threads: int | None = None) -> DeviceRates:
    """Time the probes and return the machine's rates.

    Args:
        probes: from `qvla_export.graph.probe_graphs.probe_graphs`.
        threads: threads of one operator; None for one a physical core.

    Raises:
        QvlaError: a probe that the rates need is missing.
    """
    largest = max(probe.width for probe in probes)
    large = [probe for probe in probes if probe.width == largest]
    floats = [probe for probe in large if probe.bits == _FLOAT_BITS]
    integers = [probe for probe in large if probe.integer]
    codes = [p for p in large if p.bits != _FLOAT_BITS and not p.integer]
    small = [probe for probe in probes if probe.width != largest]
    if not (floats and integers and small):
        raise QvlaError("the rates need probes of float, integer and tiny products")
    float_ops = _operations_s(floats[0], threads)
    expanded = {probe: _expansion(probe, threads) for probe in codes}
    mode = PowerMode(
        name=f"cpu, {threads or 'all'} threads",
        bandwidth_gb_s=4 * floats[0].weights / _seconds(floats[0], 1, threads) / 1e9,
        dense_tops={
            "float32": float_ops / 1e12,
            "int8": _operations_s(integers[0], threads) / 1e12,
        },
    )
    rates = KernelRates(
        bandwidth_share=1.0,
        compute_share=1.0,
        launch_us=_seconds(small[0], 1, threads) / small[0].products * 1e6,
        kernels_between=_KERNELS_BETWEEN,
        channel_tile=16,
        uncertainty=_UNCERTAINTY,
        unchecked_uncertainty=_INT8_UNCERTAINTY,
        checked_mode=mode.name,
        source=f"measured here with ONNX Runtime {onnxruntime.__version__}",
        expanded_share={p.bits: ops / float_ops for p, (ops, _) in expanded.items()},
        expanded_gcodes_s={p.bits: gcodes for p, (_, gcodes) in expanded.items()},
    )
    return DeviceRates(mode, rates)


def _expansion(probe: Probe, threads: int | None) -> tuple[float, float]:
    """Operations a second beside the expansion of the codes, and 1e9 codes expanded a second."""
    one, many = _seconds(probe, 1, threads), _seconds(probe, _ROWS, threads)
    # Noise may make many rows as fast as one.
    beside = max(many - one, many / 10)
    return 2 * (_ROWS - 1) * probe.weights / beside, probe.weights / one / 1e9


def _operations_s(probe: Probe, threads: int | None) -> float:
    """Operations a second where multiplications decide."""
    return 2 * _ROWS * probe.weights / _seconds(probe, _ROWS, threads)


def _seconds(probe: Probe, rows: int, threads: int | None) -> float:
    """Fastest of several runs: other processes only ever add time.

    One thread runs the graph in the caller's, whose own time does not count their turns.
    """
    clock = time.thread_time_ns if threads == 1 else time.perf_counter_ns
    session = onnxruntime.InferenceSession(
        probe.model, ort_options(0, threads), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(0).normal(size=(rows, probe.width)).astype(np.float32)
    found = []
    for _ in range(_REPEATS + 1):
        start = clock()
        session.run(None, {"x": x})
        found.append((clock() - start) / 1e9)
    return min(found[1:])
