"""The TensorRT runner on a GPU that computes on the CPU and keeps the real one's rules."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeDevice, FakeTensorRt
from numpy.typing import NDArray
from trt_bundles import bundle_of_parts

from engines.base import EngineError, InvalidFeeds
from engines.load import load_engine
from engines.trt.builder import BuildSettings, build_engines
from engines.trt.device import DeviceError
from engines.trt.engine import TensorRtEngine
from engines.trt.shapes import PromptRange
from engines.trt.sidecar import Sidecar
from engines.verify import judge
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle

LONGEST = 50
LENGTHS = (2, 3, 7, 8, 20, 33, LONGEST)


class Rig:
    """A built bundle, a fake GPU, and what opens one on the other."""

    def __init__(self, bundle: Bundle, folder: Path, sidecars: tuple[Sidecar, ...]) -> None:
        self.bundle, self.folder, self.sidecars = bundle, folder, sidecars
        self.reset()

    def reset(self, device: FakeDevice | None = None, name: str = "tensorrt_rtx") -> None:
        self.device = device or FakeDevice()
        self.trt = FakeTensorRt(self.bundle, self.sidecars, self.device, name)

    def open(self, **settings: Any) -> TensorRtEngine:
        return TensorRtEngine(
            self.bundle, self.folder, lambda: self.device, self.trt.module(), **settings
        )


@pytest.fixture(scope="module")
def built(trt_home: Path, tiny_policy: OftPolicy, tiny_observations: Callable[..., Any]) -> Rig:
    bundle = bundle_of_parts(tiny_policy, tiny_observations(3), trt_home / "bundle")
    settings = BuildSettings(PromptRange(2, 6, LONGEST))
    sidecars = build_engines(bundle, trt_home / "engines", settings, find=lambda: None)
    return Rig(bundle, trt_home / "engines", sidecars)


@pytest.fixture
def rig(built: Rig) -> Rig:
    built.reset()
    return built


def feeds_of(length: int, seed: int = 0) -> dict[str, NDArray[Any]]:
    generator = np.random.default_rng((length, seed))
    return {
        "pixel_values": generator.normal(size=(1, 6, 28, 28)).astype(np.float32),
        "input_ids": generator.integers(0, 300, (1, length)),
        "state": generator.normal(size=(1, 4)).astype(np.float32),
    }


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_acts_as_onnx_runtime_at_every_prompt_length(rig: Rig, name: str) -> None:
    rig.reset(name=name)
    with rig.open(max_shapes=3) as engine, load_engine(rig.bundle, 1, runtime="ort") as cpu:
        # Twice each, in an order that drops contexts and makes them anew.
        for length in (*LENGTHS, *reversed(LENGTHS)):
            for seed in (0, 1):
                feeds = feeds_of(length, seed)
                got, expected = engine.infer(feeds), cpu.infer(feeds)
                np.testing.assert_array_equal(got["actions"], expected["actions"])
                assert got["actions"].dtype == np.float32
        assert rig.device.launched > 0


def test_is_verified_like_any_engine(rig: Rig) -> None:
    with rig.open() as engine:
        verdict = judge(rig.bundle, engine)
        verdict.require_passed()
        assert engine.runtime == "tensorrt_rtx 1.7.1.116 NVIDIA GeForce RTX 4070"
    assert verdict.drift.worst < 1e-5


def test_a_length_seen_before_is_launched_as_graphs(rig: Rig) -> None:
    parts = len(rig.bundle.parts)
    with rig.open() as engine:
        engine.infer(feeds_of(5))
        assert (rig.device.launched, rig.device.living_graphs) == (0, parts)
        engine.infer(feeds_of(5, seed=1))
        assert rig.device.launched == parts
        # The first part does not depend on the prompt: its graph serves another length too.
        engine.infer(feeds_of(6))
        assert rig.device.launched == parts + 1
        assert rig.device.living_graphs == 2 * parts - 1
        assert not engine.graph_failures


def test_graphs_are_bounded(rig: Rig) -> None:
    with rig.open(max_shapes=2) as engine:
        for length in LENGTHS:
            engine.infer(feeds_of(length))
            assert rig.device.living_graphs <= 1 + 2 * 2
    assert rig.device.living_graphs == 0


def test_results_outlive_the_next_action(rig: Rig) -> None:
    with rig.open() as engine:
        first = engine.infer(feeds_of(5))["actions"]
        kept = first.copy()
        engine.infer(feeds_of(5, seed=1))
    np.testing.assert_array_equal(first, kept)


def test_stage_times_come_from_events(rig: Rig) -> None:
    with rig.open() as engine:
        engine.infer(feeds_of(5))
        assert list(engine.part_ms) == [
            *("host_to_device", "vision", "decoder", "head", "device_to_host")
        ]
        # The fake clock counts works and events: three copies in, one work a stage, one copy out.
        assert list(engine.part_ms.values()) == [4, 2, 2, 2, 2]


def test_layers_report_to_the_profiler_and_graphs_stay(rig: Rig) -> None:
    rig.trt.layer_ms = {
        "vision": {"blocks.0.fc1.b4/MatMul": 0.5, "blocks.0.fc1.b8/MatMul": 0.25},
        "decoder": {"__myl_Fused_1": 1.0},
        "head": {"head.fc/MatMul": 0.125},
    }
    with rig.open() as engine:
        engine._layers["decoder"] = [  # what the inspector says of engines that have verbosity
            {
                "Name": "__myl_Fused_1",
                "LayerType": "kgen",
                "Metadata": "[ONNX Layer: text.q.b2/MatMul]\x1f[ONNX Layer: text.q/Gather]",
            }
        ]
        first = engine.infer(feeds_of(5))["actions"]
        graphs = rig.device.living_graphs
        times = engine.layer_times(feeds_of(5), passes=3)
        assert rig.device.living_graphs == graphs
        np.testing.assert_array_equal(engine.infer(feeds_of(5))["actions"], first)
    assert [(row.part, row.layer, row.bits, row.op_type) for row in times.rows] == [
        ("vision", "blocks.0.fc1", 4, "MatMul"),
        ("vision", "blocks.0.fc1", 8, "MatMul"),
        ("decoder", "text.q", 2, "kgen"),
        ("head", "head.fc", None, "MatMul"),
    ]
    assert times.passes == 3 and times.total_ms == 1.875
    assert [(group.name, group.ms) for group in times.by_layer()] == [
        ("text.q", 1.0),
        ("blocks.0.fc1", 0.75),
        ("head.fc", 0.125),
    ]
    assert not rig.device.memory


def test_a_profiler_without_reports_is_an_error(rig: Rig) -> None:
    with rig.open() as engine, pytest.raises(EngineError, match="reports \\[0\\] layers"):
        engine.layer_times(feeds_of(5), passes=2)


def test_acting_allocates_nothing(rig: Rig) -> None:
    with rig.open() as engine:
        before = (dict(rig.device.memory), rig.device.events)
        for length in LENGTHS:
            engine.infer(feeds_of(length))
        assert rig.device.memory.keys() == before[0].keys()
        assert rig.device.events == before[1]


def test_nothing_is_left_behind(rig: Rig) -> None:
    engine = rig.open()
    engine.infer(feeds_of(4))
    assert rig.device.memory
    engine.close()
    engine.close()
    assert not rig.device.memory and not rig.device.living_graphs and rig.device.closed
    with pytest.raises(EngineError, match="closed; load it again"):
        engine.infer(feeds_of(4))


def test_buffers_are_as_large_as_the_longest_prompt_needs(rig: Rig) -> None:
    with rig.open():
        sizes = sorted(memory.nbytes for memory in rig.device.memory.values())
    tokens = 4 + LONGEST + 1
    hidden, patches = 2 * tokens * 32, 2 * 4 * 32
    assert sizes == sorted([6 * 28 * 28 * 4, LONGEST * 8, 4 * 4, patches, hidden, 16 * 4, 4096])


@pytest.mark.parametrize("length", [1, LONGEST + 1])
def test_prompts_beyond_the_profile_are_refused(rig: Rig, length: int) -> None:
    with (
        rig.open() as engine,
        pytest.raises(InvalidFeeds, match=r"\[1, 2\] to \[1, 50\].*--prompt-max"),
    ):
        engine.infer(feeds_of(length))


def test_too_little_memory_frees_what_was_allocated(rig: Rig) -> None:
    rig.reset(FakeDevice(memory_bytes=20_000))
    with pytest.raises(DeviceError, match="cannot allocate"):
        rig.open()
    assert not rig.device.memory and rig.device.closed


def test_runs_without_graphs_where_capture_fails(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.device.captures = False
    with rig.open() as engine, caplog.at_level(logging.WARNING):
        first, second = engine.infer(feeds_of(5)), engine.infer(feeds_of(5))
        assert set(engine.graph_failures) == {"vision", "decoder", "head"}
    np.testing.assert_array_equal(first["actions"], second["actions"])
    assert rig.device.launched == 0
    # Said once a stage, not once an action.
    assert [r.message.count("without a CUDA graph") for r in caplog.records] == [1, 1, 1]


def test_refused_work_is_explained(rig: Rig) -> None:
    rig.trt.broken = ("decoder",)
    with (
        rig.open() as engine,
        pytest.raises(EngineError, match=r"part 'decoder' cannot be executed[\s\S]*cudaError"),
    ):
        engine.infer(feeds_of(5))
