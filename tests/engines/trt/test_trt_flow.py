"""A part that repeats on TensorRT: built by the real builder, run on the GPU that is none.

There ONNX Runtime computes each part's graph: equal actions say that tensors go where the program
says, and nothing about TensorRT's numbers.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import FakeDevice, FakeTensorRt
from family_cases import FAMILY_CASES
from trt_bundles import AGAIN, FLOW, FLOW_PARTS, STEPS, bundle_of_parts

from engines.base import EngineError
from engines.load import load_engine
from engines.targets import find_target
from engines.trt.buffers import Buffers
from engines.trt.builder import BuildSettings, build_engines
from engines.trt.engine import TensorRtEngine
from engines.trt.modules import BuildError
from engines.trt.shapes import PromptRange, ShapeRange, require_fillable
from engines.trt.sidecar import Sidecar, sidecar_path
from engines.verify import judge
from qvla_export.graph.export import export_bundle
from qvla_export.policies.families import load_policy
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import TensorSpec
from qvla_export.shared.program import PartRuns, Program

CALLS = {"vision": 1, "decoder": 1, "start": 1, "flow": STEPS, "again": AGAIN}


@pytest.fixture(scope="module")
def bundle(
    trt_home: Path, tiny_policy: OftPolicy, tiny_observations: Callable[..., list[Observation]]
) -> Bundle:
    return bundle_of_parts(
        tiny_policy, tiny_observations(3), trt_home / "bundle", parts=FLOW_PARTS, program=FLOW
    )


def opened(bundle: Bundle, folder: Path, prompt: PromptRange) -> tuple[FakeDevice, TensorRtEngine]:
    sidecars = build_engines(bundle, folder, BuildSettings(prompt), find=lambda: None)
    device = FakeDevice()
    trt = FakeTensorRt(bundle, sidecars, device, "tensorrt_rtx")
    return device, TensorRtEngine(bundle, folder, lambda: device, trt.module())


@pytest.fixture(scope="module")
def rig(bundle: Bundle, trt_home: Path) -> Any:
    device, engine = opened(bundle, trt_home / "engines", PromptRange(2, 6, 60))
    with engine:
        yield device, engine
    assert device.closed and device.living_graphs == 0


def test_repetitions_act_as_onnx_runtime_s(
    bundle: Bundle, rig: tuple[FakeDevice, TensorRtEngine]
) -> None:
    """In turn, so that nothing of an action before is left in a flow or a number."""
    device, engine = rig
    with load_engine(bundle, 1, runtime="ort") as cpu:
        for feeds in (*bundle.golden().feeds, *bundle.golden().feeds):
            got = engine.infer(feeds)["actions"]
            np.testing.assert_array_equal(got, cpu.infer(feeds)["actions"])
            assert engine.part_calls == CALLS
    assert judge(bundle, engine).passed
    before = device.launched
    engine.infer(bundle.golden().feeds[0])
    assert device.launched == before + 3 + STEPS + AGAIN and not engine.graph_failures
    # Two for each run that repeats the step, whose memory changes places; the first run's of each
    # prompt length.
    lengths = {feeds["input_ids"].shape for feeds in bundle.golden().feeds}
    assert device.living_graphs == 2 + len(lengths) * (1 + 2) + 2


def test_a_run_s_time_is_of_all_its_repetitions(
    bundle: Bundle, rig: tuple[FakeDevice, TensorRtEngine]
) -> None:
    _, engine = rig
    engine.infer(bundle.golden().feeds[0])
    assert list(engine.part_ms) == ["host_to_device", *CALLS, "device_to_host"]
    # The clock counts works and events: three copies before the first step and none between two.
    assert engine.part_ms["flow"] == 3 + STEPS + 1
    assert engine.part_ms["again"] == 3 + AGAIN + 1


def test_an_engine_has_a_profile_for_each_run(bundle: Bundle, trt_home: Path) -> None:
    """Whatever the prompt's length is, the second run sees four places."""
    sidecar = Sidecar.load(sidecar_path(trt_home / "engines", "step"))
    first, second = (inputs["context"] for inputs in sidecar.origin.profiles)
    assert [shape[1] for shape in (first.min, first.opt, first.max)] == [7, 11, 65]
    assert second == ShapeRange(*[(1, 4, 32)] * 3)
    again = build_engines(
        bundle, trt_home / "engines", BuildSettings(PromptRange(2, 6, 60)), find=lambda: None
    )
    assert sidecar in again, "kept"


def test_what_no_repetition_puts_out_anew_is_copied(bundle: Bundle, trt_home: Path) -> None:
    """An index that is the first one again each time: with memory exchanged it would be others'."""
    last = replace(FLOW.runs[-1], times=4, carry={"next_flow": "flow", "first_index": "index"})
    other = replace(bundle, program=Program((*FLOW.runs[:-1], last)))
    device, engine = opened(other, trt_home / "copied", PromptRange(2, 6, 60))
    with engine, load_engine(other, 1, runtime="ort") as cpu:
        for feeds in other.golden().feeds:
            got, expected = engine.infer(feeds)["actions"], cpu.infer(feeds)["actions"]
            np.testing.assert_array_equal(got, expected)
        assert engine.part_ms["again"] == 3 + 4 + (4 - 1) + 1
    assert device.closed


def test_memory_of_other_sizes_is_not_exchanged() -> None:
    device, kind = FakeDevice(), np.float32
    specs = [TensorSpec("small", "float32", (2,)), TensorSpec("large", "float32", (3,))]
    ranges = {spec.name: ShapeRange(*[spec.shape] * 3) for spec in specs}  # type: ignore[arg-type]  # no names
    buffers = Buffers(device, specs, specs, ranges)
    first = dict(buffers.addresses)
    buffers.upload("small", np.arange(2, dtype=kind))
    buffers.exchange("small", "large", (2,))
    found = buffers.download("large", (2,))
    device.synchronize()
    assert buffers.addresses == first and found.tolist() == [0, 1]


def test_a_graph_of_fixed_shapes_has_one_profile_whatever_calls_it(
    bundle: Bundle, trt_home: Path
) -> None:
    """TensorRT gives its engine no other, and refuses a context of a second one."""
    again = PartRuns("look again", ("vision",))
    twice = replace(bundle, program=Program((*FLOW.runs[:-1], again, FLOW.runs[-1])))
    _, engine = opened(twice, trt_home / "twice", PromptRange(2, 6, 60))
    with engine:
        assert judge(twice, engine).passed
        assert engine.part_calls == {**CALLS, "look again": 1}
    sidecar = Sidecar.load(sidecar_path(trt_home / "twice", "vision"))
    assert len(sidecar.origin.profiles) == 1


def test_layers_of_a_part_count_as_often_as_it_runs(bundle: Bundle, trt_home: Path) -> None:
    sidecars = build_engines(
        bundle, trt_home / "engines", BuildSettings(PromptRange(2, 6, 60)), find=lambda: None
    )
    device = FakeDevice()
    trt = FakeTensorRt(bundle, sidecars, device, "tensorrt_rtx")
    trt.layer_ms = {name: {f"{name}.x/MatMul": 0.5} for name in FLOW_PARTS}
    with TensorRtEngine(bundle, trt_home / "engines", lambda: device, trt.module()) as engine:
        times = engine.layer_times(bundle.golden().feeds[0], passes=4)
    found = [(row.part, row.median_ms) for row in times.rows]
    once = [(name, 0.5) for name in ("vision", "decoder", "start")]
    assert found == [*once, ("step", 0.5 * STEPS), ("step", 0.5 * AGAIN)]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"flow": "next_flow", "context": "patches"}, "fills index"),
        ({**FLOW.runs[-1].start, "hidden": "patches"}, "fills hidden"),
        ({**FLOW.runs[-1].start, "noise": "flow"}, "fills noise"),
    ],
)
def test_memory_of_others_is_not_filled(
    bundle: Bundle, start: dict[str, str], message: str
) -> None:
    other = replace(bundle, program=Program((*FLOW.runs[:-1], replace(FLOW.runs[-1], start=start))))
    with pytest.raises(BuildError, match=message):
        require_fillable(other)
    with pytest.raises(EngineError, match=message):
        TensorRtEngine(other, Path("nowhere"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["pi0", "pi05", "smolvla", "diffusion", "openvla", "univla", "act"]
)
def test_families_are_built_and_run(family: str, trt_home: Path) -> None:
    """Flows step by step, tokens one after the other: no tensor is another's, none is stale."""
    case = FAMILY_CASES[family]
    policy, target = (
        load_policy(case.write(trt_home / family / "checkpoint")),
        find_target("rtx4070"),
    )
    bundle = export_bundle(policy, None, target, case.observations(2), trt_home / family / "bundle")
    device, engine = opened(bundle, trt_home / family / "engines", PromptRange(2, 8, 64))
    with engine, load_engine(bundle, 1, runtime="ort") as cpu:
        for feeds in bundle.golden().feeds:
            got, expected = engine.infer(feeds)["actions"], cpu.infer(feeds)["actions"]
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)
            assert engine.part_calls == cpu.part_calls
        assert judge(bundle, engine).passed
    assert device.living_graphs == 0
