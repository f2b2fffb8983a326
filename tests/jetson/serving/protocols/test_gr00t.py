"""GR00T's ZMQ protocol over real sockets."""

import io
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import msgpack
import numpy as np
import pytest
import zmq
from echo_policy import IMAGE, OFT, OPENVLA, EchoPolicy, GatedPolicy, oft_fields, post
from gr00t_client import Gr00tClient, npy
from ports import free_port

from jetson.errors import RefusedSetting
from jetson.server import open_server
from jetson.server_settings import ServerSettings


@contextmanager
def gr00t_server(policy: EchoPolicy, **settings: Any) -> Iterator[tuple[int, str]]:
    port = free_port()
    with open_server(policy, ServerSettings(port=0, gr00t_port=port, **settings)) as url:
        yield port, url


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with gr00t_server(EchoPolicy(OFT), max_body_bytes=1 << 20) as (port, _):
        yield port


def nested(value: int = 0, **changes: Any) -> dict[str, Any]:
    observation = {
        "video": {"front": npy((IMAGE + value)[None, None]), "hand": npy(IMAGE[None, None])},
        "state": {"state": npy(np.zeros((1, 1, 8), np.float32))},
        "language": {"annotation.human.task_description": [["push"]]},
    }
    return {k: v for k, v in {**observation, **changes}.items() if v is not None}


def test_a_client_gets_actions(port: int) -> None:
    with Gr00tClient(port) as client:
        actions, info = client.get_action(nested(5))
        assert actions["actions"].shape == (1, 4, 7) and actions["actions"].dtype == np.float32
        np.testing.assert_array_equal(
            actions["actions"][0, :, :2], [[5, 0], [5, 1], [5, 2], [5, 3]]
        )
        assert info["timing_ms"]["engine"] == 1.5


def test_flat_keys_are_answered_with_flat_keys(port: int) -> None:
    observation = {
        "video.front": npy((IMAGE + 6)[None, None]),
        "video.hand": npy(IMAGE[None, None]),
        "state.state": npy(np.zeros((1, 1, 8), np.float32)),
        "annotation.human.action.task_description": ["push"],
    }
    with Gr00tClient(port) as client:
        actions, _ = client.get_action(observation)
        assert actions["action.actions"][0, 0, 0] == 6


def test_the_other_endpoints(port: int) -> None:
    with Gr00tClient(port) as client:
        assert client.call("ping")["status"] == "ok"
        assert client.call("reset", {"options": None}) == {}
        config = client.call("get_modality_config")
        assert {kind: value["as_json"]["modality_keys"] for kind, value in config.items()} == {
            "video": ["front", "hand"],
            "state": ["state"],
            "language": ["instruction"],
            "action": ["actions"],
        }
        assert config["action"]["as_json"]["delta_indices"] == [0, 1, 2, 3]
        assert all(value["__ModalityConfig_class__"] for value in config.values())
        assert "SIGTERM" in client.call("kill")["error"]
        assert "Unknown" in client.call("Unknown")["error"]
        assert client.call("ping")["status"] == "ok"


def test_a_policy_without_state_has_no_state_modality() -> None:
    with gr00t_server(EchoPolicy(OPENVLA)) as (port, _), Gr00tClient(port) as client:
        assert set(client.call("get_modality_config")) == {"video", "language", "action"}
        observation = nested(2, video={"image": npy((IMAGE + 2)[None, None])}, state=None)
        assert client.get_action(observation)[0]["actions"][0, 0, 0] == 2


def pickled() -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def edited(array: Any, old: bytes, new: bytes) -> dict[str, Any]:
    packed = npy(array)
    return {**packed, "as_npy": packed["as_npy"].replace(old, new)}


VIDEO = IMAGE[None, None]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"video": {"front": npy(VIDEO)}}, "missing"),
        ({"video": {"front": npy(IMAGE), "hand": npy(VIDEO)}}, "[1, 1, ...]"),
        ({"video": {"front": npy(np.repeat(VIDEO, 2, 1)), "hand": npy(VIDEO)}}, "[1, 1, ...]"),
        ({"video": {"front": npy(VIDEO.astype(np.float32)), "hand": npy(VIDEO)}}, "uint8"),
        ({"video": {"front": npy(VIDEO[..., 0]), "hand": npy(VIDEO)}}, "h, w, 3"),
        ({"video": {"front": pickled(), "hand": npy(VIDEO)}}, "plain number"),
        ({"video": {"front": b"raw", "hand": npy(VIDEO)}}, "np.save"),
        ({"video": {"front": edited(VIDEO, b"20, 3)", b"99, 3)"), "hand": npy(VIDEO)}}, "bytes"),
        ({"video": {"front": edited(VIDEO, b"|u1", b"<f4"), "hand": npy(VIDEO)}}, "bytes"),
        ({"video": {"front": edited(VIDEO, b"NUMPY", b"OTHER"), "hand": npy(VIDEO)}}, "np.save"),
        ({"video": {"state": npy(VIDEO)}}, "names of their own"),
        ({"video": [npy(VIDEO)]}, "'video' must be a map"),
        ({"state": {"a": 1, "b": 2}}, "--state-fields"),
        ({"state": {"state": npy(np.zeros((1, 1, 3)))}}, "8 numbers"),
        ({"state": {"state": npy(np.full((1, 1, 8), np.nan))}}, "NaN"),
        ({"state": None}, "needs a state"),
        ({"language": {"task": [["push", "pull"]]}}, "instruction"),
        ({"language": {"task": [["fail"]]}}, "PolicyFailure: the policy failed"),
        ({"language": {"task": [["nan"]]}}, "NaN or infinity"),
        ({"language": {}}, "one 'language' entry"),
    ],
)
def test_a_bad_observation_gets_a_reason(port: int, changes: dict[str, Any], reason: str) -> None:
    with Gr00tClient(port) as client:
        reply = client.get_action(nested(**changes))
        assert set(reply) == {"error"} and reason in reply["error"]
        assert client.get_action(nested())[0]["actions"].shape == (1, 4, 7)


@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_in_either_order(port: int, order: Any) -> None:
    image = np.asarray((IMAGE + 8)[None, None], order=order)
    video = {"front": npy(image), "hand": npy(image)}
    with Gr00tClient(port) as client:
        assert client.get_action(nested(video=video))[0]["actions"][0, 0, 0] == 8


@pytest.mark.parametrize("message", [b"", b"\xc1", b"\x93", b"\xdd\xff\xff\xff\xff" * 400, b"\x01"])
def test_a_malformed_message_gets_a_reason(port: int, message: bytes) -> None:
    with Gr00tClient(port) as client:
        assert "WireError" in client.send(message)["error"]


def test_a_long_message_gets_a_reason(port: int) -> None:
    with Gr00tClient(port) as client:
        assert "1048576 bytes" in client.send(b"x" * (2 << 20))["error"]


def test_peers_that_speak_otherwise_harm_nobody(port: int) -> None:
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{port}")
    for parts in ([b"x"], [b"a", b"b"], [b"", b"a", b"b", b"c"], [b"x" * (8 << 20)]):
        dealer.send_multipart(parts)
    with socket.create_connection(("127.0.0.1", port)) as browser:
        browser.sendall(b"POST /act HTTP/1.1\r\nHost: localhost\r\n\r\n")
    for _ in range(20):
        with Gr00tClient(port) as leaver:
            leaver.socket.send(msgpack.packb({"data": {"observation": nested()}}))
    with Gr00tClient(port) as client:
        assert client.get_action(nested(4))[0]["actions"][0, 0, 0] == 4
    context.destroy(linger=0)


def test_the_token_is_asked_of_every_endpoint() -> None:
    token = "0123456789abcdef"
    with gr00t_server(EchoPolicy(OFT), token=token) as (port, _):
        for wrong in (None, token[:-1], "é" * 16):
            with Gr00tClient(port, wrong) as client:
                for endpoint in ("ping", "get_action", "reset", "kill", "get_modality_config"):
                    assert "Unauthorized" in client.call(endpoint)["error"]
        with Gr00tClient(port, token) as client:
            assert client.call("ping")["status"] == "ok"
            assert client.get_action(nested())[0]["actions"].shape == (1, 4, 7)


def test_one_engine_for_http_and_zmq() -> None:
    policy = EchoPolicy(OFT)
    with gr00t_server(policy) as (port, url), ThreadPoolExecutor(4) as pool:

        def over_zmq(value: int) -> list[float]:
            with Gr00tClient(port) as client:
                replies = [client.get_action(nested(value)) for _ in range(10)]
            return [float(actions["actions"][0, 0, 0]) for actions, _ in replies]

        asked = [pool.submit(over_zmq, value) for value in range(3)]
        assert {post(url, oft_fields()).status_code for _ in range(10)} == {200}
        assert [request.result() for request in asked] == [[float(v)] * 10 for v in range(3)]
    assert policy.most_together == 1


def test_draining_answers_what_is_under_way() -> None:
    policy = GatedPolicy()
    with ThreadPoolExecutor(1) as pool:
        with gr00t_server(policy, warmup=0) as (port, _):
            client = Gr00tClient(port)
            reply = pool.submit(client.get_action, nested(9))
            assert policy.acting.wait(20)
            threading.Timer(0.3, policy.gate.set).start()
        assert reply.result(20)[0]["actions"][0, 0, 0] == 9
        client.__exit__()


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=0, gr00t_port=taken.getsockname()[1])
        with (
            pytest.raises(RefusedSetting, match=r"another --gr00t-port"),
            open_server(EchoPolicy(OFT), settings),
        ):
            pass


@pytest.mark.parametrize("shape", [b"(0, 2147483647, 2147483647, 2147483647, 9)", b"(9999999999,)"])
def test_an_impossible_shape_gets_a_reason(port: int, shape: bytes) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b", }\n"
    data = b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header
    image = {"__ndarray_class__": True, "as_npy": data}
    with Gr00tClient(port) as client:
        reply = client.get_action(nested(video={"front": image, "hand": npy(VIDEO)}))
        assert "shape" in reply["error"]
