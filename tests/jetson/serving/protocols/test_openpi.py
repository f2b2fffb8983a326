"""openpi's websocket protocol over real sockets, driven by the published openpi-client."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
from echo_policy import IMAGE, OFT, OPENVLA, EchoPolicy, GatedPolicy, oft_fields, post
from openpi_client import msgpack_numpy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from websockets.exceptions import ConnectionClosed, ConnectionClosedError, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from jetson.server import open_server
from jetson.server_settings import ServerSettings

# The published client connects as websockets 17.1 deprecates, and never closes.
pytestmark = pytest.mark.filterwarnings(
    r"ignore:connect\(\) must be used as a context manager:DeprecationWarning"
)
_OPENED: list[ClientConnection] = []


@pytest.fixture(autouse=True)
def closed_clients() -> Iterator[None]:
    yield
    while _OPENED:
        _OPENED.pop().close()


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, max_body_bytes=1 << 20)) as url:
        yield url


def client_of(url: str, **options: Any) -> WebsocketClientPolicy:
    client = WebsocketClientPolicy(url.replace("http", "ws", 1), **options)
    _OPENED.append(client._ws)
    return client


def raw_client(url: str) -> ClientConnection:
    connection = connect(url.replace("http", "ws", 1), compression=None, max_size=None)
    connection.recv()
    _OPENED.append(connection)
    return connection


def libero(**changes: Any) -> dict[str, Any]:
    """What openpi's LIBERO example sends."""
    observation = {
        "observation/image": IMAGE,
        "observation/wrist_image": IMAGE + 1,
        "observation/state": np.zeros(8),
        "prompt": "push",
    }
    return {k: v for k, v in {**observation, **changes}.items() if v is not None}


def test_the_server_speaks_first(url: str) -> None:
    metadata = client_of(url).get_server_metadata()
    assert metadata["cameras"] == ["front", "hand"] and metadata["horizon"] == 4


def test_a_libero_client(url: str) -> None:
    client = client_of(url)
    first = client.infer(libero(**{"observation/image": IMAGE + 7}))
    assert first["actions"].dtype == np.float32
    np.testing.assert_array_equal(first["actions"][:, :2], [[7, 0], [7, 1], [7, 2], [7, 3]])
    assert first["policy_timing"]["engine_ms"] == 1.5
    assert first["policy_timing"]["infer_ms"] >= 1 <= first["server_timing"]["infer_ms"]
    assert "prev_total_ms" not in first["server_timing"]
    second = client.infer(libero())
    assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]
    client.reset()


def test_an_aloha_client_sends_channels_first(url: str) -> None:
    images = {"front": (IMAGE + 3).transpose(2, 0, 1), "hand": IMAGE}
    reply = client_of(url).infer({"images": images, "state": np.zeros(8), "prompt": "push"})
    assert reply["actions"][0, 0] == 3


def test_the_policy_s_own_names_and_a_policy_of_one_camera() -> None:
    with open_server(EchoPolicy(OPENVLA), ServerSettings(port=0)) as url:
        reply = client_of(url).infer({"image": IMAGE + 2, "prompt": "push"})
        assert reply["actions"].shape == (4, 7) and reply["actions"][0, 0] == 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"observation/image": None}, "missing .*front"),
        ({"observation/image": IMAGE.astype(np.float32)}, "uint8"),
        ({"observation/image": IMAGE[..., 0]}, r"h, w, 3"),
        ({"observation/image": "a picture"}, "openpi_client.msgpack_numpy"),
        ({"observation/state": np.zeros(3)}, "8 numbers"),
        ({"observation/state": np.full(8, np.nan)}, "NaN"),
        ({"prompt": None}, "instruction"),
        ({"image": IMAGE}, "twice"),
        ({"unnorm_key": "libero"}, r"available: \['tiny'\]"),
        ({"prompt": "fail"}, "PolicyFailure: .*the engine is on fire"),
        ({"prompt": "nan"}, "NaN or infinity"),
    ],
)
def test_a_failure_is_a_text_reason_and_close_1011(
    url: str, changes: dict[str, Any], reason: str
) -> None:
    client = client_of(url)
    with pytest.raises(RuntimeError, match=reason) as failure:
        client.infer(libero(**changes))
    assert "Traceback" not in str(failure.value)
    with pytest.raises(ConnectionClosedError) as closed:
        client.infer(libero())
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1011
    assert client_of(url).infer(libero())["actions"].shape == (4, 7)


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc1",
        b"\x01\x02",
        b"\xdd\xff\xff\xff\xff" * 400,  # lists of 2^32-1 lists, 400 deep
        b"\x81" * 2000,
        b"\xc7\x04\x05abcd",  # an extension type
        "text",
        msgpack_numpy.packb({b"observation/image": 1}),
        msgpack_numpy.packb([1, 2]),
    ],
)
def test_a_malformed_message_gets_a_reason(url: str, message: bytes | str) -> None:
    with raw_client(url) as connection:
        connection.send(message)
        assert str(connection.recv(timeout=20)).startswith("WireError: ")
        with pytest.raises(ConnectionClosedError):
            connection.recv(timeout=20)


@pytest.mark.parametrize(
    "array",
    [
        {b"dtype": "|O"},
        {b"dtype": "<V8"},
        {b"dtype": [["a", "<f4"]]},
        {b"shape": [1 << 31, 1 << 31]},
        {b"shape": [-1]},
        {b"shape": [16, 20, 4]},
        {b"shape": None},
        {b"data": b""},
        {b"data": "text"},
    ],
)
def test_an_array_whose_parts_disagree_is_refused(url: str, array: dict[bytes, Any]) -> None:
    packed = {
        b"__ndarray__": True,
        b"data": IMAGE.tobytes(),
        b"dtype": "|u1",
        b"shape": [16, 20, 3],
    }
    client = client_of(url)
    with pytest.raises(RuntimeError, match=r"WireError: 'image'"):
        client.infer(libero(**{"observation/image": {**packed, **array}}))


def test_a_message_beyond_the_limit_is_cut_off(url: str) -> None:
    with raw_client(url) as connection, pytest.raises(ConnectionClosed) as closed:
        connection.send(b"x" * (2 << 20))
        connection.recv(timeout=20)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_fragments_and_pings_are_understood(url: str) -> None:
    message = msgpack_numpy.packb(libero())
    with raw_client(url) as connection:
        connection.send([message[:100], message[100:1000], message[1000:]])
        assert msgpack_numpy.unpackb(connection.recv())["actions"].shape == (4, 7)
        assert connection.ping().wait(20)


def test_health_is_openpi_s(url: str) -> None:
    assert requests.get(url + "/healthz", timeout=20).content == b"OK\n"


def test_openpi_and_http_clients_share_one_engine() -> None:
    policy = EchoPolicy(OFT)
    with open_server(policy, ServerSettings(port=0)) as url, ThreadPoolExecutor(6) as pool:

        def over_websocket(value: int) -> list[float]:
            client = client_of(url)
            image = np.full((8, 8, 3), value, np.uint8)
            replies = [client.infer(libero(**{"observation/image": image})) for _ in range(10)]
            return [float(reply["actions"][0, 0]) for reply in replies]

        asked = [pool.submit(over_websocket, value) for value in range(3)]
        posted = [pool.submit(post, url, oft_fields()) for _ in range(20)]
        assert [request.result() for request in asked] == [[float(v)] * 10 for v in range(3)]
        assert {request.result().status_code for request in posted} == {200}
    assert policy.most_together == 1


def test_more_clients_than_allowed_are_told() -> None:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, max_connections=1)) as url:
        first = client_of(url)
        with pytest.raises(InvalidStatus) as refused:
            client_of(url)
        assert refused.value.response.status_code == 503
        assert b"the limit is 1" in (refused.value.response.body or b"")
        assert first.infer(libero())["actions"].shape == (4, 7)


def test_a_client_that_leaves_during_inference_harms_nobody(url: str) -> None:
    message = msgpack_numpy.packb(libero())
    for _ in range(20):
        connection = raw_client(url)
        connection.send(message)
        connection.socket.close()
    assert client_of(url).infer(libero())["actions"].shape == (4, 7)


def test_draining_sends_the_reply_that_is_under_way() -> None:
    policy = GatedPolicy()
    with ThreadPoolExecutor(2) as pool:
        with open_server(policy, ServerSettings(port=0, warmup=0)) as url:
            client, idle = client_of(url), raw_client(url)
            reply = pool.submit(client.infer, libero())
            assert policy.acting.wait(20)
            threading.Timer(0.3, policy.gate.set).start()
        assert reply.result(20)["actions"].shape == (4, 7)
        with pytest.raises(ConnectionClosedError) as closed:
            idle.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1012


def test_the_api_key_of_openpi_client_is_the_token() -> None:
    token = "a token that is not guessed".replace(" ", "-")
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, token=token)) as url:
        assert client_of(url, api_key=token).infer(libero())["actions"].shape == (4, 7)
        for wrong in (None, token[:-1], "x" * 40):
            with pytest.raises(InvalidStatus) as refused:
                client_of(url, api_key=wrong)
            assert refused.value.response.status_code == 401
            assert b"Bearer" in (refused.value.response.body or b"")
