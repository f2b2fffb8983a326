"""A client that does not read its replies ends, and keeps no place from others."""

import socket
import ssl
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import json_numpy
import msgpack
import numpy as np
import psutil
import pytest
from echo_policy import EchoPolicy, oft_fields
from gr00t_client import npy
from openpi_client import msgpack_numpy
from ports import free_port
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from zmtp_peer import long_frame, peer

from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving import event_loop
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.security import TlsFiles

# Replies of megabytes: the kernel's buffers take a few.
_LARGE = PolicyContract(("front", "hand"), 4096, 64, 8, "tiny")
_UNREAD_S = 0.2


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "UNREAD_TIMEOUT_S", _UNREAD_S)


def http_client(stack: ExitStack) -> socket.socket:
    url = stack.enter_context(open_server(EchoPolicy(_LARGE), ServerSettings(port=0)))
    place = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
    client = stack.enter_context(socket.create_connection(place, timeout=20))
    body = json_numpy.dumps(oft_fields()).encode()
    head = f"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    for _ in range(3):
        client.sendall(head.encode() + body)
    return client


def zmq_client(stack: ExitStack) -> socket.socket:
    port = free_port()
    stack.enter_context(open_server(EchoPolicy(_LARGE), ServerSettings(port=0, gr00t_port=port)))
    client = peer(port, stack)
    # libzmq ends a peer that does not await its handshake.
    received = b""
    while b"ROUTER" not in received:
        received += client.recv(1 << 10)
    fields = oft_fields()
    images = {name: npy(fields["full_image"][None, None]) for name in ("front", "hand")}
    seen = {"state": {"state": npy(np.zeros((1, 1, 8)))}, "language": {"task": [["push"]]}}
    body = msgpack.packb({"data": {"observation": {"video": images, **seen}}})
    for _ in range(8):
        client.sendall(b"\x01\0" + long_frame(0, len(body)) + body)
    return client


def await_end(client: socket.socket) -> None:
    """Wait until the server has let go of a connection; nothing of it is read."""
    own, end_s = client.getsockname()[1], time.monotonic() + 60.0
    while any(
        c.raddr and c.raddr[1] == own and c.status == psutil.CONN_ESTABLISHED
        for c in psutil.Process().net_connections("tcp")
    ):
        assert time.monotonic() < end_s, "the server keeps it"
        time.sleep(0.05)


@pytest.mark.parametrize("open_client", [http_client, zmq_client])
def test_whoever_does_not_read_is_cut_off(
    open_client: Callable[[ExitStack], socket.socket],
) -> None:
    with ExitStack() as stack:
        await_end(open_client(stack))


def test_an_encrypted_websocket_that_is_not_read_leaves_no_descriptor(
    certificates: Path,
) -> None:
    files = TlsFiles(certificates / "server.pem", certificates / "server.key")
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    message = msgpack_numpy.packb(oft_fields())
    with open_server(EchoPolicy(_LARGE), ServerSettings(port=0, tls=files)) as url:
        wss = url.replace("https", "wss")
        with connect(wss, ssl=context, proxy=None, max_size=None, max_queue=1) as client:
            client.recv(timeout=20)
            with suppress(ConnectionClosed):
                for _ in range(40):
                    client.send(message)
            await_end(client.socket)


def test_whoever_reads_slowly_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_loop, "UNREAD_TIMEOUT_S", 20.0)
    with ExitStack() as stack:
        client = http_client(stack)
        received = b""
        while received.count(b"HTTP/1.1 200") < 3:
            received += client.recv(1 << 18)
