"""A client that does not read its replies ends, and keeps no place from others."""

import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import json_numpy
import msgpack
import numpy as np
import psutil
import pytest
from echo_policy import IMAGE, EchoPolicy, oft_fields, post
from gr00t_client import Gr00tClient, npy
from openpi_client import msgpack_numpy
from ports import free_port
from vla_eval_client import VlaEvalClient, tagged
from vla_eval_client import pack as vla_eval_message
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from zmtp_peer import long_frame, peer

from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving import connections, event_loop
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.security import TlsFiles
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

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


# Messages as long as any may be: what is held of five is more than may be held.
_MOST_BYTES, _PAD, _PEERS = 8192, {"pad": bytes(5000)}, 5
OPENPI = msgpack_numpy.packb({**oft_fields(), **_PAD})
HARNESS = {
    "images": {name: tagged(IMAGE) for name in ("front", "hand")},
    "state": tagged(np.zeros(8)),
    "task_description": "push",
}


class CountingPolicy(EchoPolicy):
    """Says how often it was asked."""

    calls = 0

    def infer(self, observation: Observation) -> ActionChunk:
        self.calls += 1
        return super().infer(observation)


class Unread:
    """A websocket that asks until the server waits for it to read."""

    def __init__(self, url: str, path: str, message: bytes) -> None:
        self.stream = socket.socket()
        # The kernel's buffers hold little of what is not read.
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.stream.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        head = (
            f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        self.stream.sendall(head.encode())
        self.stream.recv(64)
        frame = struct.pack("!BBQ", 0x82, 0xFF, len(message)) + bytes(4) + message
        self._thread = threading.Thread(target=self._ask, args=(frame,), daemon=True)
        self._thread.start()

    def _ask(self, frame: bytes) -> None:
        with suppress(OSError):
            while True:
                self.stream.sendall(frame)

    @property
    def is_asking(self) -> bool:
        """Whether the server has not ended the connection."""
        return self._thread.is_alive()

    def close(self) -> None:
        with suppress(OSError):
            self.stream.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self.stream.close()


def await_calm(policy: CountingPolicy) -> None:
    """Wait until nobody is answered any more, because nobody reads."""
    before, calls = policy.calls, -1
    while policy.calls != calls or calls == before:
        calls = policy.calls
        time.sleep(0.3)


# vla-eval's replies are one action; so it is one of many numbers.
_WIDE = PolicyContract(("front", "hand"), 1, 1 << 16, 8, "tiny")


@pytest.mark.parametrize(
    ("contract", "path", "message"),
    [
        pytest.param(_LARGE, "/", OPENPI, id="openpi"),
        pytest.param(
            _WIDE, "/vla-eval", vla_eval_message("observation", HARNESS | _PAD, 1), id="vla-eval"
        ),
    ],
)
def test_who_does_not_read_keeps_nothing_from_those_who_do(
    contract: PolicyContract, path: str, message: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a place before the engine, nor the bytes of its message, nor its own connection."""
    monkeypatch.setattr(connections, "IDLE_S", 0.0)
    policy, port = CountingPolicy(contract), free_port()
    limits = {"max_pending": _PEERS, "max_connections": _PEERS, "max_body_bytes": _MOST_BYTES}
    settings = ServerSettings(port=0, gr00t_port=port, warmup=0, max_rate_hz=0.0, **limits)
    assert _MOST_BYTES * 4 < len(message) * _PEERS <= _MOST_BYTES * _PEERS
    with open_server(policy, settings) as url, ExitStack() as stack:
        peers = []
        for _ in range(_PEERS):
            peers.append(Unread(url, path, message))
            stack.callback(peers[-1].close)
            await_calm(policy)
        for _ in range(3):
            assert post(url, oft_fields()).status_code == 200
        with Gr00tClient(port) as client:
            images = {name: npy(IMAGE[None, None]) for name in ("front", "hand")}
            language, state = {"task": [["push"]]}, {"state": npy(np.zeros((1, 1, 8)))}
            seen = {"video": images, "state": state, "language": language}
            assert "error" not in client.get_action(seen)
        harness = VlaEvalClient(url)
        stack.callback(harness.close)
        assert harness.act(HARNESS).shape == (contract.action_dim,)
        # One of them made room; the kernel tells it a moment later.
        end_s = time.monotonic() + 60.0
        while all(unread.is_asking for unread in peers):
            assert time.monotonic() < end_s, "nobody made room"
            time.sleep(0.05)
        assert sum(not unread.is_asking for unread in peers) == 1
