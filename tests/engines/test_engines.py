"""Engines refuse what does not fit, and a robot never acts on NaN."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_bundles import float_graph, make_bundle

from engines.base import EngineError, Feeds, InvalidFeeds
from engines.load import load_engine
from engines.ort import OrtEngine
from engines.targets import CPU, UnknownTarget, find_target
from engines.verify import VerificationError, action_drift, judge, verify
from jetson.policy import EnginePolicy, UnsafeAction
from qvla_export.graph.export import ExportOptions, export_bundle
from qvla_export.policies.layers import layer_shapes
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.quantizer.uniform_plan import uniform_plan
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.observation import Observation

Observations = Callable[..., list[Observation]]


@pytest.fixture(scope="module")
def bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Observations,
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("engines") / "float"
    return make_bundle(tiny_policy, None, tiny_observations(2), path)


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> OrtEngine:
    return OrtEngine(bundle, threads=1)


class ConstantEngine:
    """Puts out one number everywhere."""

    def __init__(self, bundle: Bundle, value: float) -> None:
        self.inputs, self.outputs, self.runtime = bundle.inputs, bundle.outputs, "constant 1"
        self.part_ms: dict[str, float] = {}
        self.part_calls: dict[str, int] = {}
        self._value = value

    def infer(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        return {"actions": np.full((1, 4, 4), self._value, np.float32)}

    def close(self) -> None:
        pass

    def __enter__(self) -> "ConstantEngine":
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state": None}, r"missing \['state'\], unknown \[\]"),
        ({"depth": np.zeros(1)}, r"unknown \['depth'\]"),
        ({"input_ids": np.ones((1, 4), np.int32)}, "'input_ids' must be a int64 array, got int32"),
        ({"state": [0.0] * 4}, "'state' must be a float32 array, got list"),
        (
            {"state": np.zeros((1, 5), np.float32)},
            r"'state' must have shape \[1, 4\], got \[1, 5\]",
        ),
        ({"state": np.zeros(4, np.float32)}, r"got \[4\]"),
        ({"input_ids": np.ones((1, 0), np.int64)}, r"\[1, 'prompt'\], got \[1, 0\]"),
        ({"pixel_values": np.zeros((2, 6, 28, 28), np.float32)}, r"got \[2, 6, 28, 28\]"),
    ],
)
def test_bad_feeds(engine: OrtEngine, bundle: Bundle, change: dict[str, Any], message: str) -> None:
    feeds = {**bundle.golden().feeds[0], **change}
    feeds = {name: value for name, value in feeds.items() if value is not None}
    with pytest.raises(InvalidFeeds, match=message):
        engine.infer(feeds)


def test_engine_is_deterministic_and_closes(bundle: Bundle) -> None:
    feeds = bundle.golden().feeds[0]
    with load_engine(bundle, threads=2) as engine:
        first, second = engine.infer(feeds), engine.infer(feeds)
    np.testing.assert_array_equal(first["actions"], second["actions"])
    for call in (engine.infer, engine.layer_times):
        with pytest.raises(EngineError, match="closed"):
            call(feeds)


def test_threads_must_be_positive(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="threads must be at least 1"):
        load_engine(bundle, threads=0)


def test_damaged_graph_is_an_engine_error(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(EngineError, match="cannot load"):
        OrtEngine(replace(bundle, path=tmp_path))


def test_unknown_target_names_the_nearest() -> None:
    with pytest.raises(UnknownTarget, match="Did you mean 'cpu'"):
        find_target("gpu0")


def test_engine_policy_acts_as_torch(
    bundle: Bundle, engine: OrtEngine, tiny_policy: OftPolicy, tiny_observations: Observations
) -> None:
    policy = EnginePolicy(bundle, engine)
    for observation in tiny_observations(3, seed=5):
        got, expected = policy.infer(observation), tiny_policy.infer(observation)
        np.testing.assert_allclose(got.actions, expected.actions, atol=1e-4)
        assert set(got.timing_ms) == {*("preprocess", "engine", "engine.policy", "postprocess")}
        # ONNX Runtime on a CPU copies to no device, so none is claimed.
        assert list(engine.part_ms) == ["policy"]
        assert 0 < got.timing_ms["engine.policy"] <= got.timing_ms["engine"]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_never_becomes_an_action(
    bundle: Bundle, tiny_observations: Observations, value: float
) -> None:
    policy = EnginePolicy(bundle, ConstantEngine(bundle, value))
    with pytest.raises(UnsafeAction, match="no action was taken"):
        policy.infer(tiny_observations(1)[0])


def test_verify_refuses_another_policys_actions(bundle: Bundle) -> None:
    with pytest.raises(VerificationError, match="differs from torch on"):
        verify(bundle, ConstantEngine(bundle, 0.3))


def test_drift_in_both_units() -> None:
    reference = np.zeros((2, 3, 2), np.float32)
    reference[..., 0] = 1
    candidate = reference.copy()
    candidate[1, 2] += (0.5, -0.25)
    drift = action_drift(reference, candidate, np.array([2.0, 4.0]))
    np.testing.assert_allclose(drift.max_normalized, [0.5, 0.25])
    np.testing.assert_allclose(drift.max_physical, [1.0, 1.0])
    np.testing.assert_allclose(drift.mean_normalized, [0.5 / 6, 0.25 / 6])
    assert drift.worst == 0.5
    assert 0.9 < drift.cosine < 1


def test_drift_refuses_other_shapes_and_nan() -> None:
    actions, unit = np.zeros((1, 2, 2), np.float32), np.ones(2)
    with pytest.raises(EngineError, match="must both be"):
        action_drift(actions, actions[:, :1], unit)
    with pytest.raises(EngineError, match="finite"):
        action_drift(actions, actions * np.nan, unit)


def test_kernels_that_round_activations_are_judged_as_such(
    tiny_policy: OftPolicy, tiny_observations: Observations, tmp_path: Path
) -> None:
    """The same plan with 8-bit activations in its packed products: other numbers, wider bounds."""
    plan = uniform_plan(layer_shapes(tiny_policy.layers()), 4, CPU, tiny_policy.digest)
    verdicts = {}
    for level in (0, 4):
        bundle = export_bundle(
            tiny_policy,
            plan,
            CPU,
            tiny_observations(4),
            tmp_path / str(level),
            ExportOptions({"policy": float_graph(tiny_policy)}, {"accuracy_level": level}),
        )
        with OrtEngine(bundle, threads=1) as engine:
            verdicts[level] = judge(bundle, engine)
    assert verdicts[0].drift.worst < 1e-4 < verdicts[4].drift.worst
    exact, rounded = (verdicts[n].thresholds.allowed["rms_normalized"] for n in (0, 4))
    assert (rounded > 10 * exact).all()
