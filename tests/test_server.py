"""The action server over real sockets, driven as OpenVLA's and OFT's own clients drive it."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import json_numpy
import numpy as np
import pytest
import requests

from jetson.contract import PolicyContract
from jetson.errors import PolicyFailure, RefusedSetting
from jetson.server import running_server
from jetson.service import ActionService
from jetson.settings import ServerSettings
from qvla_export.action import ActionChunk
from qvla_export.observation import Observation

ROOT = Path(__file__).parents[1]
IMAGE = np.arange(16 * 20 * 3, dtype=np.uint8).reshape(16, 20, 3)


class EchoPolicy:
    """Acts on what it sees: the action's first number is the first pixel of the first camera."""

    def __init__(self, contract: PolicyContract) -> None:
        self.contract = contract
        self.delay_s = 0.0
        self.together = 0
        self.most_together = 0

    def infer(self, observation: Observation) -> ActionChunk:
        self.together += 1
        self.most_together = max(self.most_together, self.together)
        time.sleep(self.delay_s)
        actions = np.zeros((self.contract.horizon, self.contract.action_dim), np.float32)
        actions[:, 0] = observation.images[self.contract.cameras[0]][0, 0, 0]
        actions[:, 1] = np.arange(self.contract.horizon)
        if observation.instruction == "fail":
            raise RuntimeError("the engine is on fire")
        if observation.instruction == "nan":
            actions[2, 3] = np.nan
        if observation.instruction == "short":
            actions = actions[:1]
        self.together -= 1
        return ActionChunk(actions, actions, {"preprocess": 0.25, "engine": 1.5})


OPENVLA = PolicyContract(("image",), 4, 7, 0, "tiny", "d1gest", "cpu")
OFT = PolicyContract(("front", "hand"), 4, 7, 8, "tiny")


@pytest.fixture(scope="module")
def openvla_url() -> Iterator[str]:
    with running_server(EchoPolicy(OPENVLA), ServerSettings(port=0)) as url:
        yield url


@pytest.fixture(scope="module")
def oft_policy() -> EchoPolicy:
    return EchoPolicy(OFT)


@pytest.fixture(scope="module")
def oft_url(oft_policy: EchoPolicy) -> Iterator[str]:
    with running_server(oft_policy, ServerSettings(port=0, max_body_bytes=1 << 20)) as url:
        yield url


def oft_fields(**changes: Any) -> dict[str, Any]:
    fields = {
        "full_image": IMAGE,
        "wrist_image": IMAGE + 1,
        "state": np.zeros(8),
        "instruction": "push",
    }
    return {k: v for k, v in {**fields, **changes}.items() if v is not None}


def post(url: str, fields: dict[str, Any], **options: Any) -> requests.Response:
    return requests.post(url + "/act", data=json_numpy.dumps(fields), timeout=20, **options)


@pytest.fixture
def patched() -> Iterator[None]:
    """What both deploy scripts tell their clients to do: `json_numpy.patch()`."""
    kept = json.dumps, json.loads, json.dump, json.load
    json_numpy.patch()
    yield
    json.dumps, json.loads, json.dump, json.load = kept


def test_openvla_client(openvla_url: str, patched: None) -> None:
    action = requests.post(
        openvla_url + "/act", json={"image": IMAGE + 9, "instruction": "push"}, timeout=20
    ).json()
    np.testing.assert_array_equal(action, [9, 0, 0, 0, 0, 0, 0])
    assert action.dtype == np.float64


def test_openvla_client_with_encoded_body(openvla_url: str, patched: None) -> None:
    text = json_numpy.dumps({"image": IMAGE, "instruction": "push", "unnorm_key": "tiny"})
    reply = requests.post(openvla_url + "/act", json={"encoded": text}, timeout=20).json()
    assert isinstance(reply, str)
    assert json_numpy.loads(reply).shape == (7,)


def test_oft_client(oft_url: str, patched: None) -> None:
    reply = requests.post(oft_url + "/act", json=oft_fields(full_image=IMAGE + 5), timeout=20)
    actions = reply.json()
    assert isinstance(actions, list) and len(actions) == 4
    np.testing.assert_array_equal(np.stack(actions)[:, :2], [[5, 0], [5, 1], [5, 2], [5, 3]])
    stages = [part.split(";dur=") for part in reply.headers["server-timing"].split(", ")]
    assert [name for name, _ in stages] == ["decode", "preprocess", "engine", "encode", "total"]
    assert dict(stages)["engine"] == "1.5000" and float(dict(stages)["total"]) > 0


def test_oft_client_with_encoded_body(oft_url: str) -> None:
    reply = post(oft_url, {"encoded": json_numpy.dumps(oft_fields())}).json()
    assert len(json_numpy.loads(reply)) == 4


def test_the_query_and_the_setting_choose_the_reply(openvla_url: str) -> None:
    fields = {"image": IMAGE, "instruction": "push"}
    assert len(post(openvla_url, fields, params={"reply": "chunk"}).json()) == 4
    refused = post(openvla_url, fields, params={"reply": "all"})
    assert refused.status_code == 400 and "auto" in refused.json()["error"]
    with running_server(EchoPolicy(OPENVLA), ServerSettings(port=0, reply="chunk")) as url:
        assert len(post(url, fields).json()) == 4


def test_health_and_metadata(openvla_url: str) -> None:
    health = requests.get(openvla_url + "/healthz", timeout=20)
    assert (health.status_code, health.text) == (200, "OK")
    metadata = requests.get(openvla_url + "/metadata", timeout=20).json()
    assert metadata["cameras"] == ["image"] and metadata["bundle_digest"] == "d1gest"
    assert PolicyContract.from_json(metadata) == OPENVLA


@pytest.mark.parametrize(
    ("changes", "status", "reason"),
    [
        ({"full_image": IMAGE[..., 0]}, 422, "h, w, 3"),
        ({"full_image": IMAGE.astype(np.float32)}, 422, "uint8"),
        ({"wrist_image": None}, 422, "missing"),
        ({"instruction": None}, 422, "instruction"),
        ({"state": np.full(8, np.nan)}, 422, "NaN"),
        ({"state": np.zeros(3)}, 422, "8 numbers"),
        ({"unnorm_key": "libero_spatial"}, 422, "available: ['tiny']"),
        ({"full_image": {"__numpy__": "AAAA", "dtype": "|O", "shape": [3]}}, 400, "dtype"),
        ({"instruction": "fail"}, 500, "RuntimeError: the engine is on fire"),
        ({"instruction": "nan"}, 500, "[[2, 3]]"),
        ({"instruction": "short"}, 500, "[4, 7]"),
    ],
)
def test_a_bad_request_gets_a_reason_and_no_action(
    oft_url: str, changes: dict[str, Any], status: int, reason: str
) -> None:
    reply = post(oft_url, oft_fields(**changes))
    assert reply.status_code == status
    assert reason in reply.json()["error"]
    assert set(reply.json()) == {"error", "kind"}
    assert post(oft_url, oft_fields()).status_code == 200


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xff", b"[1, 2]", b"[" * 90_000])
def test_malformed_json(oft_url: str, content: bytes) -> None:
    reply = requests.post(oft_url + "/act", data=content, timeout=20)
    assert reply.status_code == 400 and reply.json()["kind"] == "WireError"


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/act", 405), ("POST", "/", 404), ("GET", "/x", 404)]
)
def test_unknown_routes_say_what_exists(oft_url: str, method: str, path: str, status: int) -> None:
    reply = requests.request(method, oft_url + path, timeout=20)
    assert reply.status_code == status and "POST /act" in reply.json()["error"]


def test_a_declared_200_MB_body_is_refused_unread(oft_url: str) -> None:
    host, port = oft_url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.putrequest("POST", "/act")
    connection.putheader("Content-Length", str(200 << 20))
    connection.endheaders()
    reply = connection.getresponse()
    assert reply.status == 413 and b"1048576 bytes" in reply.read()
    connection.close()


def test_a_streamed_200_MB_body_is_cut_off(oft_url: str) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(200):
            sent += 1 << 20
            yield b"x" * (1 << 20)

    try:
        reply = requests.post(oft_url + "/act", data=endless(), timeout=20)
    except requests.ConnectionError:
        pass  # the server hung up while the client was still sending
    else:
        assert reply.status_code == 413
    assert sent < 64 << 20
    assert post(oft_url, oft_fields()).status_code == 200


def test_a_client_that_leaves_or_dawdles_harms_nobody() -> None:
    settings = ServerSettings(port=0, body_timeout_s=0.2)
    with running_server(EchoPolicy(OFT), settings) as url:
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /act HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{"
        for _ in range(5):
            with socket.create_connection((host, int(port))) as leaver:
                leaver.sendall(head)
        with socket.create_connection((host, int(port))) as dawdler:
            dawdler.sendall(head)
            assert b" 408 " in dawdler.recv(1000)
        assert post(url, oft_fields()).status_code == 200


def test_concurrent_requests_are_answered_each_with_its_own_action(
    oft_url: str, oft_policy: EchoPolicy
) -> None:
    oft_policy.most_together = oft_policy.together = 0

    def first_number(value: int) -> float:
        reply = post(oft_url, oft_fields(full_image=np.full((8, 8, 3), value, np.uint8)))
        return float(json_numpy.loads(reply.content)[0][0])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(first_number, range(64))) == list(range(64))
    assert oft_policy.most_together == 1


def test_too_many_waiting_requests_are_sent_away() -> None:
    policy = EchoPolicy(OFT)
    with running_server(policy, ServerSettings(port=0, max_pending=2)) as url:
        policy.delay_s = 0.3
        with ThreadPoolExecutor(5) as pool:
            replies = list(pool.map(lambda _: post(url, oft_fields()).status_code, range(5)))
    assert sorted(replies) == [200, 200, 503, 503, 503]


@pytest.mark.parametrize("instruction", ["fail", "nan", ""])
def test_strict_compat_hides_the_reason_as_upstream_does(instruction: str) -> None:
    with running_server(EchoPolicy(OFT), ServerSettings(port=0, strict_compat=True)) as url:
        reply = post(url, oft_fields(instruction=instruction))
        assert (reply.status_code, reply.json()) == (200, "error")
        big = requests.post(url + "/act", headers={"content-length": str(1 << 30)}, timeout=20)
        assert (big.status_code, big.json()) == (200, "error")
        assert isinstance(json_numpy.loads(post(url, oft_fields()).content), list)


def test_the_port_opens_only_after_warm_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    refused: list[int] = []

    class Probing(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            with socket.socket() as client:
                refused.append(client.connect_ex(("127.0.0.1", port)))
            return super().infer(observation)

    with running_server(Probing(OFT), ServerSettings(port=port, warmup=2)) as url:
        assert len(refused) == 2 and 0 not in refused
        assert post(url, oft_fields()).status_code == 200
        assert refused[2:] == [0]


def test_a_policy_that_cannot_act_never_opens_the_port() -> None:
    class Broken(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            raise RuntimeError("no kernel image")

    with (
        pytest.raises(PolicyFailure, match="no kernel image"),
        running_server(Broken(OFT), ServerSettings(port=0)),
    ):
        pass


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with (
            pytest.raises(RefusedSetting, match=r"choose another --port"),
            running_server(EchoPolicy(OFT), settings),
        ):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "robot.local", ""])
def test_remote_addresses_need_an_explicit_word(host: str) -> None:
    with pytest.raises(RefusedSetting, match="no authentication"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, allow_remote=True).host == host


@pytest.mark.parametrize(
    "change",
    [{"port": -1}, {"port": 70_000}, {"reply": "all"}, {"max_body_bytes": 0}, {"max_pending": 0}],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RefusedSetting, match=next(iter(change))):
        ServerSettings(**change)


def test_a_policy_must_say_what_it_needs() -> None:
    with pytest.raises(RefusedSetting, match="contract"):
        ActionService(object())  # type: ignore[arg-type]


SCRIPT = """
import logging, sys, time
sys.path[:0] = [{root!r}, {tests!r}]
from jetson.server import serve
from jetson.settings import ServerSettings
from test_server import OFT, EchoPolicy

logging.basicConfig(level=logging.INFO)
policy = EchoPolicy(OFT)
settings = ServerSettings(port=0, warmup=1)
policy.delay_s = 0.4
serve(policy, settings)
assert not {{"torch", "onnx", "transformers"}} & {{*sys.modules}}
print("drained", flush=True)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_under_way_finish(number: signal.Signals) -> None:
    script = SCRIPT.format(root=str(ROOT), tests=str(ROOT / "tests"))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        line = next(line for line in process.stderr if "serving on" in line)
        url = line.split()[-1]
        answers: list[requests.Response] = []
        client = threading.Thread(target=lambda: answers.append(post(url, oft_fields())))
        time.sleep(0.3)
        client.start()
        time.sleep(0.15)
        process.send_signal(number)
        client.join()
        assert answers[0].status_code == 200
        assert "drained" in process.stdout.read()
        process.stderr.read()
        assert process.wait(20) == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(url + "/healthz", timeout=5)
