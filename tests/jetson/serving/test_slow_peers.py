"""A place is for a complete request: peers that are slow or leave shut nobody out."""

import socket
import threading
import time
from contextlib import ExitStack, suppress

import json_numpy
import numpy as np
import psutil
import pytest
import requests
from echo_policy import OFT, EchoPolicy, oft_fields, post
from gr00t_client import Gr00tClient
from openpi_client import msgpack_numpy
from ports import free_port
from rude_clients import HEAD, acts, place_of, raw_frame, websocket_client, zmq_request
from websockets.exceptions import ConnectionClosed

import jetson.serving.http_protocol as http_protocol
import jetson.serving.websocket as websocket
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation


def test_bodies_that_trickle_keep_no_place_from_anybody() -> None:
    """Sixteen connections with one byte of a body shut all three protocols."""
    settings = ServerSettings(port=0, max_pending=2)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), settings))
        for _ in range(40):
            slow = stack.enter_context(socket.create_connection(place_of(url)))
            slow.sendall(HEAD)
        assert {post(url, oft_fields()).status_code for _ in range(10)} == {200}
        assert acts(websocket_client(url, stack))


def test_declared_sizes_cost_nothing_until_they_arrive() -> None:
    """Thirty-one declared frames of 31 MB cost 960 MB."""
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        before = psutil.Process().memory_info().rss
        for _ in range(31):
            client = websocket_client(url, stack)
            client.socket.sendall(raw_frame(0x82, 31 << 20))
            stack.callback(client.socket.shutdown, socket.SHUT_RDWR)
        assert acts(websocket_client(url, stack))
        assert psutil.Process().memory_info().rss - before < 200 << 20


@pytest.mark.parametrize("sent", [b"", b"POST /act HT", HEAD[:40]])
def test_a_head_that_does_not_come_ends_the_connection(
    sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_TIMEOUT_S", 0.2)
    with (
        open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url,
        socket.create_connection(place_of(url), timeout=20) as client,
    ):
        client.sendall(sent)
        with suppress(ConnectionResetError):
            assert client.recv(100) == b""
        # One that has asked before may be silent: robots pause.
        with requests.Session() as session:
            assert session.get(url + "/healthz", timeout=20).status_code == 200
            time.sleep(0.5)
            assert session.get(url + "/healthz", timeout=20).status_code == 200
            assert session.get(url + "/healthz", timeout=20).headers.get("connection") != "close"


def test_a_message_that_trickles_ends_and_a_silent_client_is_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(websocket, "_LOOK_S", 1)
    monkeypatch.setattr(websocket, "_MESSAGE_S", 0.5)
    monkeypatch.setattr(websocket, "_PING_S", 0.5)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        alive, slow = websocket_client(url, stack), websocket_client(url, stack)
        slow.socket.sendall(raw_frame(0x82, 1000, b"x"))
        with pytest.raises(ConnectionClosed) as closed:
            slow.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1008
        # A dead one: it does not answer pings, as its reader does not run.
        host, port = place_of(url)
        dead = stack.enter_context(socket.create_connection((host, port), timeout=20))
        dead.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        while dead.recv(1 << 16):
            pass
        assert acts(alive), "it answered the pings"


def test_work_whose_client_has_left_never_reaches_the_engine() -> None:
    gate, asked = threading.Event(), threading.Semaphore(0)

    class Gated(EchoPolicy):
        instructions: list[str] = []  # noqa: RUF012 - one test's own class

        def infer(self, observation: Observation) -> ActionChunk:
            self.instructions.append(observation.instruction)
            asked.release()
            gate.wait(20)
            return super().infer(observation)

    policy = Gated(OFT)
    with ExitStack() as stack:
        gr00t_port = free_port()
        settings = ServerSettings(port=0, warmup=0, gr00t_port=gr00t_port)
        url = stack.enter_context(open_server(policy, settings))
        message = msgpack_numpy.packb(oft_fields(prompt="leaver"))
        first = threading.Thread(target=post, args=(url, oft_fields(instruction="stayer")))
        first.start()
        assert asked.acquire(timeout=20)
        for _ in range(3):
            with websocket_client(url, ExitStack()) as leaver:
                leaver.send(message)
        for _ in range(3):
            with socket.create_connection(place_of(url)) as leaver:
                body = json_numpy.dumps(oft_fields(instruction="leaver")).encode()
                leaver.sendall(HEAD[:-2].replace(b"30000000", b"%d" % len(body)) + b"\n" + body)
        with Gr00tClient(gr00t_port) as gone:
            gone.socket.send(zmq_request("leaver"))
            time.sleep(0.3)
        time.sleep(0.3)
        gate.set()
        first.join(20)
        assert post(url, oft_fields(instruction="last")).status_code == 200
        with Gr00tClient(gr00t_port) as there:
            assert isinstance(there.send(zmq_request("over ZMQ")), list)
    assert policy.instructions == ["stayer", "last", "over ZMQ"]


def test_images_arrive_whole_in_growing_buffers() -> None:
    """Three pictures of several megabytes, in frames of every size."""
    large = np.random.default_rng(0).integers(0, 255, (900, 900, 3), np.uint8)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        client = websocket_client(url, stack)
        message = msgpack_numpy.packb(oft_fields(full_image=large, wrist_image=large))
        assert len(message) > 4 << 20
        for pieces in (1, 2, 60):
            size = -(-len(message) // pieces)
            parts = [message[i : i + size] for i in range(0, len(message), size)]
            client.send(iter(parts)) if pieces > 1 else client.send(message)
            reply = msgpack_numpy.unpackb(client.recv(timeout=60))
            assert reply["actions"][0, 0] == large[0, 0, 0]
