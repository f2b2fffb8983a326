"""The remote policy: the same actions as the policy it stands for, reasons for the rest."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from jetson.clients.http_client import RemotePolicy
from jetson.errors import RemoteError
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.observation import Observation

# One camera with OpenVLA's field name: the client must still get the whole chunk.
CONTRACT = PolicyContract(("image",), 3, 2, 0, "tiny", "d1gest", "cpu")
OBSERVATION = Observation({"image": np.full((4, 5, 3), 7, np.uint8)}, "push")


class PixelPolicy:
    contract = CONTRACT

    def infer(self, observation: Observation) -> ActionChunk:
        if observation.instruction == "fail":
            raise RuntimeError("out of memory")
        pixel = float(observation.images["image"][0, 0, 0])
        normalized = np.full((3, 2), pixel, np.float32) / 255
        return ActionChunk(normalized * 10, normalized, {"engine": 1.25})


@pytest.fixture(scope="module")
def remote() -> Iterator[RemotePolicy]:
    with (
        open_server(PixelPolicy(), ServerSettings(port=0)) as url,
        RemotePolicy(url + "/") as policy,
    ):
        yield policy


def test_remote_actions_equal_local_ones(remote: RemotePolicy) -> None:
    local = PixelPolicy().infer(OBSERVATION)
    chunk = remote.infer(OBSERVATION)
    np.testing.assert_array_equal(chunk.actions, local.actions)
    np.testing.assert_array_equal(chunk.normalized, local.normalized)
    assert chunk.actions.dtype == np.float32
    assert list(chunk.timing_ms) == ["decode", "engine", "encode", "transport"]
    assert chunk.timing_ms["engine"] == 1.25
    assert remote.contract == CONTRACT


def test_a_remote_policy_can_itself_be_served(remote: RemotePolicy) -> None:
    with open_server(remote, ServerSettings(port=0)) as url, RemotePolicy(url) as second:
        np.testing.assert_array_equal(
            second.infer(OBSERVATION).actions, PixelPolicy().infer(OBSERVATION).actions
        )


def test_failures_keep_their_reason(remote: RemotePolicy) -> None:
    failing = Observation(OBSERVATION.images, "fail")
    with pytest.raises(RemoteError, match=r"500.*out of memory"):
        remote.infer(failing)
    with pytest.raises(InvalidObservation, match="missing"):
        remote.infer(Observation({"top": OBSERVATION.images["image"]}, "push"))
    # Refused by the server, not by the client's own check.
    with pytest.raises(InvalidObservation, match=r"refused the observation.*2000 characters"):
        remote.infer(Observation(OBSERVATION.images, "push " * 1000))
    assert remote.infer(OBSERVATION).actions.shape == (3, 2)


def test_strict_compat_is_recognized() -> None:
    settings = ServerSettings(port=0, strict_compat=True)
    with open_server(PixelPolicy(), settings) as url, RemotePolicy(url) as policy:
        with pytest.raises(RemoteError, match="strict compatibility"):
            policy.infer(Observation(OBSERVATION.images, "fail"))
        assert policy.infer(OBSERVATION).actions.shape == (3, 2)


def test_nobody_there() -> None:
    with pytest.raises(RemoteError, match="is `qvla serve` running"):
        RemotePolicy("http://127.0.0.1:9", timeout_s=2)
    with pytest.raises(RemoteError, match="http://"):
        RemotePolicy("127.0.0.1:8000")


def test_a_proxy_of_the_environment_is_not_used(
    monkeypatch: pytest.MonkeyPatch, remote: RemotePolicy
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with RemotePolicy(remote.url) as policy:
        assert policy.contract == CONTRACT


@contextmanager
def fake_server(metadata: Any, act: bytes = b"", delay_s: float = 0) -> Iterator[str]:
    release = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def reply(self, content: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def do_GET(self) -> None:
            self.reply(metadata if isinstance(metadata, bytes) else json.dumps(metadata).encode())

        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            if delay_s:
                release.wait(delay_s)
                return
            self.reply(act)

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            release.set()
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    "metadata",
    [b"<html>", [], {}, {"cameras": "image"}, {**CONTRACT.to_json(), "horizon": "3"}],
)
def test_metadata_of_something_else_is_refused(metadata: Any) -> None:
    with fake_server(metadata) as url, pytest.raises(RemoteError, match="metadata"):
        RemotePolicy(url)


def full_reply(data: str) -> bytes:
    array = {"__numpy__": data, "dtype": "<f4", "shape": [1, 2]}
    return json.dumps({"actions": array, "normalized": array}).encode()


@pytest.mark.parametrize(
    "act",
    [
        b"",
        b"[]",
        b'{"actions": [[1, 2]]}',
        full_reply("AADAfwAAwH8="),  # NaN
        full_reply("AAAAAAAAAAA="),  # one step only
    ],
)
def test_an_unreadable_action_is_never_passed_on(act: bytes) -> None:
    with (
        fake_server(CONTRACT.to_json(), act) as url,
        RemotePolicy(url) as policy,
        pytest.raises(RemoteError, match="/act"),
    ):
        policy.infer(OBSERVATION)


def test_a_stalled_server_times_out() -> None:
    with (
        fake_server(CONTRACT.to_json(), delay_s=10) as url,
        RemotePolicy(url, timeout_s=1.5) as policy,
        pytest.raises(RemoteError, match="Timeout"),
    ):
        policy.infer(OBSERVATION)
