"""The action server over real sockets, driven as OpenVLA's and OFT's own clients drive it."""

import http.client
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import json_numpy
import numpy as np
import pytest
import requests
from echo_policy import IMAGE, OFT, OPENVLA, EchoPolicy, GatedPolicy, oft_fields, post

from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.policy_contract import PolicyContract


@pytest.fixture(scope="module")
def openvla_url() -> Iterator[str]:
    with open_server(EchoPolicy(OPENVLA), ServerSettings(port=0)) as url:
        yield url


@pytest.fixture(scope="module")
def oft_policy() -> EchoPolicy:
    return EchoPolicy(OFT)


@pytest.fixture(scope="module")
def oft_url(oft_policy: EchoPolicy) -> Iterator[str]:
    with open_server(oft_policy, ServerSettings(port=0, max_body_bytes=1 << 20)) as url:
        yield url


def deploy_client(url: str, fields: dict[str, Any]) -> tuple[Any, requests.Response]:
    """Post as both deploy scripts tell their clients to: `json=` after `json_numpy.patch()`."""
    kept = json.dumps, json.loads, json.dump, json.load
    json_numpy.patch()
    try:
        response = requests.post(url + "/act", json=fields, timeout=20)
        return response.json(), response
    finally:
        json.dumps, json.loads, json.dump, json.load = kept


def test_openvla_client(openvla_url: str) -> None:
    action, _ = deploy_client(openvla_url, {"image": IMAGE + 9, "instruction": "push"})
    np.testing.assert_array_equal(action, [9, 0, 0, 0, 0, 0, 0])
    assert action.dtype == np.float64


def test_openvla_client_with_encoded_body(openvla_url: str) -> None:
    text = json_numpy.dumps({"image": IMAGE, "instruction": "push", "unnorm_key": "tiny"})
    reply, _ = deploy_client(openvla_url, {"encoded": text})
    assert isinstance(reply, str)
    assert json_numpy.loads(reply).shape == (7,)


def test_oft_client(oft_url: str) -> None:
    actions, response = deploy_client(oft_url, oft_fields(full_image=IMAGE + 5))
    assert isinstance(actions, list) and len(actions) == 4
    np.testing.assert_array_equal(np.stack(actions)[:, :2], [[5, 0], [5, 1], [5, 2], [5, 3]])
    stages = [part.split(";dur=") for part in response.headers["server-timing"].split(", ")]
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
    with open_server(EchoPolicy(OPENVLA), ServerSettings(port=0, reply="chunk")) as url:
        assert len(post(url, fields).json()) == 4


def test_health_and_metadata(openvla_url: str) -> None:
    health = requests.get(openvla_url + "/healthz", timeout=20)
    assert (health.status_code, health.text) == (200, "OK\n")
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
    ("method", "path", "status"), [("GET", "/act", 405), ("POST", "/", 405), ("GET", "/x", 404)]
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
    settings = ServerSettings(port=0, body_timeout_s=1.0)
    with open_server(EchoPolicy(OFT), settings) as url:
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{"
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
    policy = GatedPolicy()
    settings = ServerSettings(port=0, max_pending=2, warmup=0)
    with open_server(policy, settings) as url, ThreadPoolExecutor(5) as pool:
        replies = as_completed([pool.submit(post, url, oft_fields()) for _ in range(5)])
        refused = [next(replies).result().status_code for _ in range(3)]
        policy.gate.set()
        assert refused == [503] * 3
        assert [reply.result().status_code for reply in replies] == [200, 200]


@pytest.mark.parametrize("instruction", ["fail", "nan", ""])
def test_strict_compat_hides_the_reason_as_upstream_does(instruction: str) -> None:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, strict_compat=True)) as url:
        reply = post(url, oft_fields(instruction=instruction))
        assert (reply.status_code, reply.json()) == (200, "error")
        big = requests.post(url + "/act", headers={"content-length": str(1 << 30)}, timeout=20)
        assert (big.status_code, big.json()) == (200, "error")
        assert isinstance(json_numpy.loads(post(url, oft_fields()).content), list)
