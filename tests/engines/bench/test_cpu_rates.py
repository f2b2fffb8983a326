"""Rates of this CPU: the probes are what they say, the rates predict, no time is asserted."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from ort_graphs import packed_matmuls
from small_latency_models import SMALL

from engines.bench.cpu_rates import measure_cpu_rates
from engines.ort import ort_options
from engines.targets import CPU
from qvla_export.graph.probe_graphs import probe_graphs
from qvla_export.latency_model.kernel_rates import DeviceRates, Probe
from qvla_export.latency_model.roofline import LatencyModel
from qvla_export.shared.errors import QvlaError

PROBES = probe_graphs(CPU, 64, 2)


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: f"{p.width}-{p.bits}-{p.integer}")
def test_probes_run_the_kernels_they_are_named_after(probe: Probe, tmp_path: Path) -> None:
    model = tmp_path / "probe.onnx"
    model.write_bytes(probe.model)
    packed = packed_matmuls(model, tmp_path / "optimized.onnx")
    float_products = probe.bits == 32 or probe.integer
    assert packed == (Counter() if float_products else Counter({probe.bits: probe.products}))
    options = ort_options(0, 1)
    session = onnxruntime.InferenceSession(probe.model, options, ["CPUExecutionProvider"])
    x = np.ones((3, probe.width), np.float32)
    (y,) = session.run(None, {"x": x})
    assert y.shape == x.shape and np.isfinite(y).all()


def test_probes_cover_every_stored_width_of_the_target() -> None:
    kinds = {(p.bits, p.integer) for p in PROBES}
    assert kinds == {(32, False), (2, False), (4, False), (8, False), (8, True)}
    assert len({p.width for p in PROBES}) == 2


def test_measured_rates_predict(tmp_path: Path) -> None:
    measured = measure_cpu_rates(PROBES, threads=1)
    path = tmp_path / "rates.json"
    measured.save(path)
    assert DeviceRates.load(path) == measured
    assert set(measured.rates.expanded_gcodes_s) == {2, 4, 8}
    model = LatencyModel(SMALL.network, CPU, measured.mode, measured.rates)
    widths = {name: np.full(c, 8, np.int8) for name, (c, _) in SMALL.layers.items()}
    for predicted in (model.predict(), model.predict(widths), model.predict(widths, "int8")):
        assert 0 < predicted.total_ms < np.inf
        assert predicted.uncertainty > 1
    twice = replace(measured.rates, expanded_gcodes_s={2: 1e9, 4: 1e9, 8: 1e9})
    assert replace(model, rates=twice).predict(widths).total_ms < model.predict(widths).total_ms


def test_missing_probes_are_refused() -> None:
    with pytest.raises(QvlaError, match="need probes"):
        measure_cpu_rates([probe for probe in PROBES if not probe.integer])
