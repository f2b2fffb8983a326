"""A policy exported in parts for TensorRT: built by the real builder, run by the runner."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeDevice, FakeTensorRt
from tiny_bundles import mixed_plan

from engines.load import load_engine
from engines.targets import RTX4070
from engines.trt.builder import build_engines
from engines.trt.engine import TensorRtEngine
from engines.trt.sizes import measure_sizes
from engines.verify import judge
from jetson.policy import EnginePolicy
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.quantize import spec_for


def test_a_staged_policy_acts_as_torch(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    plan = replace(
        mixed_plan(tiny_policy),
        target=RTX4070.name,
        containers=dict(RTX4070.containers),
        quantizer=spec_for(RTX4070),
    )
    bundle = export_bundle(
        tiny_policy,
        plan,
        RTX4070,
        tiny_observations(4),
        tmp_path / "bundle",
        ExportOptions(layers_per_part=1),
    )
    assert len(bundle.parts) >= 5
    sidecars = build_engines(bundle, tmp_path / "engines", find=lambda: None)
    device = FakeDevice()
    trt = FakeTensorRt(bundle, sidecars, device, "tensorrt_rtx")
    observations = tiny_observations(6, seed=3)
    with (
        TensorRtEngine(bundle, tmp_path / "engines", lambda: device, trt.module()) as engine,
        load_engine(bundle, 1, runtime="ort") as cpu,
    ):
        judge(bundle, engine).require_passed()
        on_gpu, on_cpu = EnginePolicy(bundle, engine), EnginePolicy(bundle, cpu)
        for observation in observations:
            got, expected = on_gpu.infer(observation), on_cpu.infer(observation)
            np.testing.assert_allclose(got.actions, expected.actions, atol=1e-6)
        assert set(engine.part_ms) == {
            "host_to_device",
            *(s.name for s in bundle.parts),
            "device_to_host",
        }
        assert device.launched > 0
    size = measure_sizes(bundle, sidecars)
    assert size.engine_weight_bytes is not None
    # Parts of a few kilobytes each: what the builder adds to a part counts here.
    assert abs(size.engine_weight_bytes / size.onnx_bytes - 1) < 0.1
