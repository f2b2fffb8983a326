"""A real bundle behind the server: over HTTP arrives what the policy does."""

from collections.abc import Callable, Iterator

import json_numpy
import numpy as np
import pytest
import requests

from engines.load import load_engine
from engines.targets import find_target
from jetson.clients.http_client import RemotePolicy
from jetson.latency.measure import ProfileSubject, profile_latency
from jetson.policy import EnginePolicy
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from qvla_export.graph.export import export_bundle
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.clock import whole_spans
from qvla_export.shared.observation import Observation


@pytest.fixture(scope="module")
def served(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[EnginePolicy]:
    path = tmp_path_factory.mktemp("served") / "bundle"
    export_bundle(tiny_policy, None, find_target("cpu"), tiny_observations(2), path)
    bundle = Bundle.load(path)
    with load_engine(bundle, threads=1) as engine:
        yield EnginePolicy(bundle, engine)


@pytest.fixture(scope="module")
def url(served: EnginePolicy) -> Iterator[str]:
    with open_server(served, ServerSettings(port=0)) as url:
        yield url


def test_both_dialects_get_the_policys_actions(
    url: str,
    served: EnginePolicy,
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., list[Observation]],
) -> None:
    for observation in tiny_observations(3, seed=5):
        expected = served.infer(observation).actions
        fields = {
            "full_image": observation.images["image"],
            "state": observation.state.astype(np.float64),
            "instruction": observation.instruction,
        }
        reply = requests.post(url + "/act", data=json_numpy.dumps(fields), timeout=20)
        np.testing.assert_array_equal(np.stack(json_numpy.loads(reply.content)), expected)
        fields["image"] = fields.pop("full_image")
        reply = requests.post(url + "/act?reply=action", data=json_numpy.dumps(fields), timeout=20)
        np.testing.assert_array_equal(json_numpy.loads(reply.content), expected[0])
        np.testing.assert_allclose(expected, tiny_policy.infer(observation).actions, atol=1e-3)


def test_a_remote_policy_is_the_policy(
    url: str, served: EnginePolicy, tiny_observations: Callable[..., list[Observation]]
) -> None:
    (observation,) = tiny_observations(1, seed=6)
    with RemotePolicy(url) as remote:
        chunk = remote.infer(observation)
        assert remote.contract.bundle_digest == served.bundle.digest
        assert (remote.contract.target, remote.contract.unnorm_key) == ("cpu", "tiny")
    expected = served.infer(observation)
    np.testing.assert_array_equal(chunk.actions, expected.actions)
    np.testing.assert_array_equal(chunk.normalized, expected.normalized)
    assert list(chunk.timing_ms) == [
        *("decode", "preprocess", "engine", "engine.policy", "postprocess", "encode"),
        "transport",
    ]


def test_a_bundle_is_profiled_span_by_span(
    served: EnginePolicy, tiny_observations: Callable[..., list[Observation]]
) -> None:
    subject = ProfileSubject(served)
    result = profile_latency({"a": subject, "b": subject}, tiny_observations(3), 2, 12)
    (profile, _) = result.profiles
    assert list(profile.samples_ms) == [
        *("decode", "preprocess", "engine", "engine.policy", "postprocess", "encode"),
        "total",
    ]
    parts = sum(profile.samples_ms[stage] for stage in whole_spans(profile.samples_ms))
    assert (profile.samples_ms["engine.policy"] <= profile.samples_ms["engine"]).all()
    assert (parts <= profile.samples_ms["total"]).all()
    assert profile.bundle_digest == served.bundle.digest
    assert [ratio.span for ratio in result.ratios] == ["total", "engine"]


def test_an_unusual_instruction_does_not_break_the_server(url: str) -> None:
    image = np.zeros((28, 28, 3), np.uint8)
    for instruction in ("{instruction} {0}", "\x00\x07", "推开按钮 🤖", "a" * 2000, "</s> <s>"):
        fields = {"full_image": image, "state": np.zeros(4), "instruction": instruction}
        reply = requests.post(url + "/act", data=json_numpy.dumps(fields), timeout=20)
        assert reply.status_code in (200, 422), reply.text
