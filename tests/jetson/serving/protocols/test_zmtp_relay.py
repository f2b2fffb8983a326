"""Strangers cost libzmq nothing: bounded parts, bytes, connections, and time."""

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import msgpack
import numpy as np
import psutil
import pytest
import zmq
from echo_policy import OFT, EchoPolicy
from gr00t_client import Gr00tClient
from ports import free_port
from zmtp_peer import GREETING, long_frame, peer

import jetson.serving.connections as connections
import jetson.serving.protocols.zmtp_relay as zmtp_relay
from jetson.server import open_server
from jetson.server_settings import ServerSettings

TOKEN = "correct-horse-battery-staple"


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    number = free_port()
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, gr00t_port=number, token=TOKEN)):
        yield number


def pings(port: int) -> bool:
    with Gr00tClient(port, TOKEN) as client:
        return bool(client.call("ping")["status"] == "ok")


def test_parts_without_end_fill_no_memory(port: int) -> None:
    """Messages of many parts cost 600 MB without a token."""
    before = psutil.Process().memory_info().rss
    block = bytes(1 << 20)
    with ExitStack() as stack:
        client = peer(port, stack)
        with suppress(OSError):
            for _ in range(600):
                client.sendall(long_frame(1, len(block)) + block)
        assert psutil.Process().memory_info().rss - before < 100 << 20
        assert pings(port)


def test_declared_sizes_and_many_connections_fill_none_either(port: int) -> None:
    before = psutil.Process().memory_info().rss
    with ExitStack() as stack:
        for _ in range(20):
            peer(port, stack).sendall(b"\x01\0" + long_frame(0, 31 << 20) + b"x")
        assert pings(port)
        assert psutil.Process().memory_info().rss - before < 100 << 20


def test_idle_peers_make_room(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_S", 0.0)
    with ExitStack() as stack:
        for _ in range(40):
            peer(port, stack)
        assert pings(port)


def test_a_message_that_trickles_ends(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmtp_relay, "_MESSAGE_S", 0.2)
    with ExitStack() as stack:
        client = peer(port, stack)
        client.sendall(b"\x01\0" + long_frame(0, 1000) + b"x")
        with suppress(ConnectionResetError):
            while client.recv(1 << 16):
                pass
        assert pings(port)


@pytest.mark.parametrize(
    "sent",
    [
        b"POST /act HTTP/1.1\r\n\r\n" * 9,
        b"\xff" + bytes(8) + b"\x7f\x01" + bytes(100),
        GREETING + b"\xf8" + bytes(64),
        GREETING + b"\x06" + (1 << 40).to_bytes(8, "big"),
        GREETING + b"\0\x05hello",
        GREETING + b"\x01\0" + b"\x01\x05hello",
    ],
)
def test_whoever_speaks_otherwise_is_cut_off(port: int, sent: bytes) -> None:
    with ExitStack() as stack:
        client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
        client.sendall(sent)
        with suppress(ConnectionResetError):
            while client.recv(1 << 16):
                pass
        assert pings(port)


def test_random_bytes_harm_nobody(port: int) -> None:
    rng = random.Random(5)
    for _ in range(60):
        with ExitStack() as stack:
            client = peer(port, stack)
            body = bytearray(b"\x01\0" + long_frame(0, 300) + bytes(300))
            for _ in range(rng.randrange(1, 6)):
                body[rng.randrange(len(body))] = rng.randrange(256)
            with suppress(OSError):
                client.sendall(body[: rng.randrange(1, len(body))])
    assert pings(port)


def test_a_refusal_leaves_the_connection_usable() -> None:
    number = free_port()
    settings = ServerSettings(port=0, gr00t_port=number, max_body_bytes=1 << 20)
    with open_server(EchoPolicy(OFT), settings), Gr00tClient(number) as client:
        assert "1048576 bytes" in client.send(bytes(2 << 20))["error"]
        assert client.call("ping")["status"] == "ok"


def test_a_name_that_a_client_chose_is_nobody_else_s(port: int) -> None:
    """libzmq would refuse the second, and so whoever is named as an attacker guessed."""
    with zmq.Context() as context:
        clients = []
        for _ in range(2):
            client = context.socket(zmq.REQ)
            for option, value in (
                (zmq.IDENTITY, b"robot"),
                (zmq.LINGER, 0),
                (zmq.RCVTIMEO, 20_000),
            ):
                client.setsockopt(option, value)
            client.connect(f"tcp://127.0.0.1:{port}")
            clients.append(client)
        for client in clients:
            client.send(msgpack.packb({"endpoint": "ping", "api_token": TOKEN}))
            assert msgpack.unpackb(client.recv())["status"] == "ok"
        for client in clients:
            client.close()


def test_every_client_gets_its_own_reply(port: int) -> None:
    """Messages of every size go through whole, over several connections at once."""
    context = zmq.Context()
    clients = [context.socket(zmq.REQ) for _ in range(5)]
    for client in clients:
        client.setsockopt(zmq.RCVTIMEO, 20_000)
        client.connect(f"tcp://127.0.0.1:{port}")
    sizes = np.random.default_rng(0).integers(0, 1 << 18, 5)
    for client, size in zip(clients, sizes, strict=True):
        client.send(bytes(int(size)))
    assert all(b"error" in client.recv() for client in clients)
    context.destroy(linger=0)
