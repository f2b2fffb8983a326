"""ONNX Runtime runs a bundle's program: parts repeat, tensors stay in the runtime."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from loop_bundles import LOOP, ROWS, loop_bundle
from onnx import helper, numpy_helper

from engines.ort import OrtEngine
from engines.program.ort_values import call_part, copied, to_ort
from engines.trt.builder import build_engines
from engines.verify import judge
from qvla_export.measurement.peak_memory import resident_bytes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation
from qvla_export.shared.part import Part, TensorSpec

Observations = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    return loop_bundle(tiny_policy, tiny_observations(2), tmp_path_factory.mktemp("loop") / "b")


@pytest.mark.parametrize("keep_loaded", [True, False])
def test_what_is_carried_comes_back_in(bundle: Bundle, keep_loaded: bool) -> None:
    with OrtEngine(bundle, threads=1, keep_loaded=keep_loaded) as engine:
        assert judge(bundle, engine).drift.worst == 0
        assert engine.part_calls == {"start": 1, "count": ROWS}
        assert list(engine.part_ms) == ["start", "count"]


def test_a_second_action_starts_anew(bundle: Bundle) -> None:
    golden = bundle.golden()
    with OrtEngine(bundle, threads=1) as engine:
        for _ in range(2):
            for feeds, actions in zip(golden.feeds, golden.reference, strict=True):
                assert np.array_equal(engine.infer(feeds)["actions"][0], actions)


def test_no_array_is_made_between_parts(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the bundle takes goes in as an array, only what it puts out comes back as one."""
    made: list[str] = []
    into, back = onnxruntime.OrtValue.ortvalue_from_numpy, onnxruntime.OrtValue.numpy

    def counted_in(*arguments: Any) -> Any:
        made.append("in")
        return into(*arguments)

    def counted_back(value: Any) -> Any:
        made.append("out")
        return back(value)

    with OrtEngine(bundle, threads=1) as engine:
        monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_numpy", counted_in)
        monkeypatch.setattr(onnxruntime.OrtValue, "numpy", counted_back)
        engine.infer(bundle.golden().feeds[0])
    assert made == ["in", "out"]


def test_layer_times_add_up_what_repeats(bundle: Bundle) -> None:
    with OrtEngine(bundle, threads=1) as engine:
        times = engine.layer_times(bundle.golden().feeds[0], passes=3)
    assert {row.part for row in times.rows} == {"start", "step"}
    assert all(len(row.samples_ms) == 3 for row in times.rows)


def test_the_program_is_what_was_written(bundle: Bundle, tmp_path: Path) -> None:
    assert Bundle.load(bundle.path).program == LOOP
    assert bundle.manifest["format"] == "qvla-bundle-3"


def test_tensorrt_builds_what_repeats(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    bundle = loop_bundle(tiny_policy, tiny_observations(1), tmp_path / "b", "rtx4070")
    built = build_engines(bundle, tmp_path / "engines")
    assert [sidecar.origin.part for sidecar in built] == [part.name for part in bundle.parts]


def test_copies_let_a_session_go_with_its_weights() -> None:
    """A tensor of the runtime's keeps what its session took; 64 MB here."""
    weights = np.ones((4096, 4096), np.float32)
    names = [helper.make_tensor_value_info(n, 1, [1, 4096]) for n in ("x", "y")]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        names[:1],
        names[1:],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    content, part = model.SerializeToString(), Part("p", (), (TensorSpec("y", "float32", (1,)),))
    fed = {"x": np.ones((1, 4096), np.float32)}

    def call() -> Mapping[str, Any]:
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        return call_part(session, part, to_ort(fed), "cpu")

    before = resident_bytes()
    held = call()
    with_session = resident_bytes()
    held = copied(held)
    without = resident_bytes()
    assert before is not None and with_session is not None and without is not None
    assert with_session - before > 60_000_000 > 20_000_000 > without - before
    assert np.array_equal(held["y"].numpy(), np.full((1, 4096), 4096, np.float32))
