"""On an NVIDIA GPU of a target: build, load, verify and compare with ONNX Runtime."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trt_bundles import AGAIN, FLOW, FLOW_PARTS, STEPS, bundle_of_parts

from engines.load import load_engine
from engines.targets import TARGETS
from engines.trt.builder import build_engines
from engines.trt.engine import TensorRtEngine
from engines.trt.gpu import find_gpu
from engines.trt.modules import BuildError, is_tensorrt, load_module
from engines.trt.sidecar import engine_folder
from engines.verify import judge
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle

pytestmark = pytest.mark.gpu


def target_here() -> str:
    """Return the target of this machine's GPU and TensorRT, or skip."""
    gpu = find_gpu()
    if gpu is None:
        pytest.skip("no NVIDIA GPU: libcuda.so.1 finds no device")
    reasons = []
    for target in TARGETS.values():
        if is_tensorrt(target) and target.compute_capability == gpu.compute_capability:
            try:
                load_module(target)
            except BuildError as error:
                reasons.append(str(error))
            else:
                if not any(importlib.util.find_spec(name) for name in ("cuda", "pycuda")):
                    pytest.skip("neither cuda-bindings nor pycuda")
                return target.name
    pytest.skip(f"no target for {gpu}: {reasons}")


@pytest.fixture
def bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Bundle:
    target = target_here()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    bundle = bundle_of_parts(tiny_policy, tiny_observations(3), tmp_path / "bundle", target)
    sidecars = build_engines(bundle, engine_folder(bundle))
    assert all(sidecar.layers for sidecar in sidecars)
    return bundle


def test_a_gpu_acts_as_onnx_runtime(bundle: Bundle) -> None:
    generator = np.random.default_rng(0)
    with load_engine(bundle) as engine, load_engine(bundle, 1, runtime="ort") as cpu:
        assert isinstance(engine, TensorRtEngine)
        for length in (2, 9, 40, 256, 9, 2):
            for _ in range(3):  # runs, captures, launches
                feeds = {
                    "pixel_values": generator.normal(size=(1, 6, 28, 28)).astype(np.float32),
                    "input_ids": generator.integers(0, 300, (1, length)),
                    "state": generator.normal(size=(1, 4)).astype(np.float32),
                }
                got, expected = engine.infer(feeds), cpu.infer(feeds)
                # float16 in between, with sums in another order.
                np.testing.assert_allclose(got["actions"], expected["actions"], atol=1e-2)
        assert not engine.graph_failures
        assert list(engine.part_ms) == [
            *("host_to_device", "vision", "decoder", "head", "device_to_host")
        ]
        assert all(ms > 0 for ms in engine.part_ms.values())
        judge(bundle, engine).require_passed()


def test_a_gpu_repeats_a_part_in_two_shapes(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target = target_here()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    flow = bundle_of_parts(
        *(tiny_policy, tiny_observations(3), tmp_path / "bundle", target),
        parts=FLOW_PARTS,
        program=FLOW,
    )
    build_engines(flow, engine_folder(flow))
    with load_engine(flow) as engine, load_engine(flow, 1, runtime="ort") as cpu:
        for _ in range(3):  # runs, captures, launches
            for feeds in flow.golden().feeds:
                got, expected = engine.infer(feeds), cpu.infer(feeds)
                np.testing.assert_allclose(got["actions"], expected["actions"], atol=1e-2)
        assert isinstance(engine, TensorRtEngine) and not engine.graph_failures
        once = {"vision": 1, "decoder": 1, "start": 1}
        assert engine.part_calls == {**once, "flow": STEPS, "again": AGAIN}


def test_a_gpu_says_what_each_layer_took(bundle: Bundle) -> None:
    generator = np.random.default_rng(0)
    feeds = {
        "pixel_values": generator.normal(size=(1, 6, 28, 28)).astype(np.float32),
        "input_ids": generator.integers(0, 300, (1, 9)),
        "state": generator.normal(size=(1, 4)).astype(np.float32),
    }
    with load_engine(bundle) as engine:
        assert isinstance(engine, TensorRtEngine)
        before = engine.infer(feeds)["actions"]
        times = engine.layer_times(feeds, passes=5)
        # Profiled contexts are others than those whose graphs are launched.
        np.testing.assert_array_equal(engine.infer(feeds)["actions"], before)
    assert {row.part for row in times.rows} == {"vision", "decoder", "head"}
    assert times.passes == 5 and times.total_ms > 0
