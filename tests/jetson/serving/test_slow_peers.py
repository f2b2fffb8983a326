"""A place is for a complete request: peers that are slow, idle or endless shut nobody out."""

import random
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress

import json_numpy
import msgpack
import numpy as np
import psutil
import pytest
import requests
from echo_policy import IMAGE, OFT, EchoPolicy, GatedPolicy, oft_fields, post
from gr00t_client import Gr00tClient, npy
from openpi_client import msgpack_numpy
from places import ROOT
from ports import free_port
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame, Opcode
from websockets.sync.client import ClientConnection, connect
from zmtp_peer import peer

import jetson.server
import jetson.serving.connections as connections
import jetson.serving.http_protocol as http_protocol
import jetson.serving.websocket as websocket
from jetson.errors import RateLimited, ServerBusy, WireError
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.byte_budget import ByteBudget
from jetson.serving.connections import Connection, Connections
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

HEAD = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000000\r\n\r\n{"


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle clients make room at once; the wait itself is not what is tested."""
    monkeypatch.setattr(connections, "IDLE_S", 0.0)


def place_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def websocket_client(url: str, stack: ExitStack) -> ClientConnection:
    client = connect(url.replace("http", "ws", 1), compression=None, max_size=None, proxy=None)
    stack.enter_context(client)
    client.recv(timeout=20)
    return client


def acts(client: ClientConnection) -> bool:
    client.send(msgpack_numpy.packb(oft_fields()))
    return msgpack_numpy.unpackb(client.recv(timeout=20))["actions"].shape == (4, 7)


def zmq_request(instruction: str) -> bytes:
    images = {name: npy(IMAGE[None, None]) for name in ("front", "hand")}
    seen = {"state": {"state": npy(np.zeros((1, 1, 8)))}, "language": {"task": [[instruction]]}}
    return msgpack.packb({"data": {"observation": {"video": images, **seen}}})


def raw_frame(first: int, declared: int, payload: bytes = b"") -> bytes:
    """A masked frame (with the mask 0) that may declare more than it has."""
    return struct.pack("!BBQ", first, 0x80 | 127, declared) + bytes(4) + payload


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


@pytest.mark.usefixtures("no_grace")
def test_idle_websockets_make_room_for_those_that_ask() -> None:
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        for _ in range(33):
            websocket_client(url, stack)
        good = websocket_client(url, stack)
        assert all(acts(good) for _ in range(3))


@pytest.mark.usefixtures("no_grace")
def test_idle_connections_make_room_for_those_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetson.server, "connection_limit", lambda: 8)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        for _ in range(20):
            stack.enter_context(socket.create_connection(place_of(url)))
        for _ in range(5):
            assert post(url, oft_fields()).status_code == 200


def test_a_full_server_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_S", 60.0)
    monkeypatch.setattr(jetson.server, "connection_limit", lambda: 2)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        for _ in range(2):
            stack.enter_context(socket.create_connection(place_of(url)))
        while True:  # until the server has taken both
            try:
                refused = requests.get(url + "/healthz", timeout=20)
            except requests.ConnectionError:
                continue
            if refused.status_code == 503:
                break
        assert refused.headers["retry-after"] == "1" and "the limit is 2" in refused.json()["error"]


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


@pytest.mark.parametrize("payload", [b"", b"x"])
def test_a_chain_of_fragments_has_an_end(payload: bytes) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        client = websocket_client(url, stack)
        for index in range(64):
            opcode = Opcode.CONT if index else Opcode.BINARY
            frame = Frame(opcode, payload, fin=False)
            client.socket.sendall(frame.serialize(mask=True))
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009
        assert "64 frames" in closed.value.rcvd.reason


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


def test_a_request_with_two_lengths_closes_the_connection() -> None:
    with (
        open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url,
        socket.create_connection(place_of(url), timeout=20) as client,
    ):
        client.sendall(
            b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        reply = b""
        while part := client.recv(1 << 16):
            reply += part
        assert reply.startswith(b"HTTP/1.1 400") and reply.count(b"HTTP/1.1") == 1
        assert b"not both" in reply


def test_a_body_of_countless_chunks_is_none() -> None:
    head = b"POST /act HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    policy = EchoPolicy(OFT)
    body = json_numpy.dumps(oft_fields()).encode()
    with open_server(policy, ServerSettings(port=0)) as url:
        for size, status in ((1, b"400"), (16, b"200")):
            pieces = [body[i : i + size] for i in range(0, len(body), size)]
            assert (len(pieces) > 1024) == (status == b"400")
            with socket.create_connection(place_of(url), timeout=20) as client:
                chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
                with suppress(ConnectionResetError, BrokenPipeError):
                    client.sendall(head + chunks + b"0\r\n\r\n")
                assert client.recv(100).split()[1] == status


def test_what_breaks_after_the_reply_ends_quietly(caplog: pytest.LogCaptureFixture) -> None:
    head = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url:
        with socket.create_connection(place_of(url), timeout=20) as client:
            client.sendall(head)
            assert client.recv(1000).split()[1] == b"200"
            client.sendall(b"no chunk\r\n")
            with suppress(ConnectionResetError):
                # The reply's body may come in a packet of its own.
                assert client.recv(1000) in (b"", b"OK\n")
                assert client.recv(1000) == b""
        assert requests.get(f"{url}/healthz", timeout=20).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


def test_pings_without_end_are_requests_too() -> None:
    settings = ServerSettings(port=0, gr00t_port=free_port(), max_rate_hz=20.0)
    ping = bytes([0x89, 0x80]) + bytes(4)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), settings))
        client = websocket_client(url, stack)
        with suppress(OSError):
            client.socket.sendall(ping * 2000)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        assert settings.gr00t_port is not None
        other = peer(settings.gr00t_port, stack)
        with suppress(OSError):
            other.sendall(b"\x04\x07\x04PING\0\0" * 2000)
        with suppress(ConnectionResetError):
            while other.recv(1 << 16):
                pass


@pytest.mark.parametrize(
    ("error", "code"), [(ServerBusy("x"), 1013), (RateLimited("x"), 1013), (WireError("x"), 1011)]
)
def test_a_websocket_closes_with_whether_to_ask_again(error: QvlaError, code: int) -> None:
    assert websocket.closing_code(error) == code


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


def test_the_slowest_message_makes_room() -> None:
    budget, evicted = ByteBudget(100), []
    slow, slower = (budget.hold(lambda n=n: evicted.append(n)) for n in ("slow", "slower"))
    slow.add(60)
    slower.add(30)
    with budget.hold(lambda: None) as quick:
        quick.add(50)
        assert evicted == ["slow"] and slow.evicted and budget.held_bytes == 80
        quick.complete()
        slower.add(15)
        with pytest.raises(ServerBusy, match="faster"):
            slower.add(15)
    assert budget.held_bytes == 0
    with budget.hold(lambda: None) as large, pytest.raises(ServerBusy):
        large.add(101)
    assert budget.held_bytes == 0


def test_whoever_is_quick_is_never_refused_and_the_bytes_are_bounded() -> None:
    rng, budget = random.Random(7), ByteBudget(1000)
    trickling = []
    for _ in range(3000):
        if rng.random() < 0.5:
            trickling.append(budget.hold(lambda: None))
        for held in rng.sample(trickling, min(3, len(trickling))):
            try:
                held.add(rng.randrange(60))
            except ServerBusy:
                trickling.remove(held)
        with budget.hold(lambda: None) as quick:
            quick.add(300)
            quick.complete()
        assert 0 <= budget.held_bytes <= 1000


def test_one_address_cannot_take_all_places() -> None:
    ended: list[str] = []
    group = Connections(10, 3, "clients")

    def connection(peer: str, busy: bool = True) -> Connection:
        return Connection(peer, lambda: ended.append(peer), busy, idle_since_s=-1e9)

    for _ in range(3):
        group.admit(connection("10.0.0.1"))
    with pytest.raises(ServerBusy, match="one address"):
        group.admit(connection("10.0.0.1"))
    for _ in range(7):
        group.admit(connection("127.0.0.1"))
    with pytest.raises(ServerBusy, match="the limit is 10"):
        group.admit(connection("10.0.0.2"))
    assert not ended


def test_the_descriptors_are_raised_and_bound_the_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 8 <= connections.connection_limit() <= 512
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft
    monkeypatch.setattr(connections, "raise_descriptor_limit", lambda: 300)
    assert connections.connection_limit() == (300 - 192) // 3
    assert hard


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


_WITHOUT_DESCRIPTORS = """
import logging, os, resource, socket, sys, time
sys.path[:0] = ["tests/helpers"]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
logging.basicConfig(stream=sys.stdout)
from echo_policy import OFT, EchoPolicy
from jetson.server import open_server
from jetson.server_settings import ServerSettings
with open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url:
    host, port = url.removeprefix("http://").split(":")
    client, spent = socket.socket(), []
    try:
        while True:
            spent.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        client.connect((host, int(port)))
    client.sendall(b"GET /healthz HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    time.sleep(2.5)
    for descriptor in spent:
        os.close(descriptor)
    client.settimeout(20)
    print("answer", client.recv(100).split()[1])
    client.close()
"""


def test_without_descriptors_accepting_pauses_and_says_so_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_DESCRIPTORS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "answer b'200'" in done.stdout, "and the client that waited is served"
    assert done.stdout.count("no connection can be accepted") == 1, done.stdout


def test_a_busy_server_says_in_every_protocol_when_to_come_back() -> None:
    policy = GatedPolicy()
    with ExitStack() as stack:
        zmq_port = free_port()
        settings = ServerSettings(port=0, gr00t_port=zmq_port, warmup=0, max_pending=1)
        url = stack.enter_context(open_server(policy, settings))
        stack.callback(policy.gate.set)
        first = threading.Thread(target=post, args=(url, oft_fields()))
        first.start()
        assert policy.acting.wait(20)
        refused = post(url, oft_fields())
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        said = "overloaded: retry after 1 s"
        assert said in refused.json()["error"]
        with Gr00tClient(zmq_port) as asking:
            told = asking.send(zmq_request("push"))
        assert said in told["error"] and told["retry_after_s"] == 1
        client = websocket_client(url, stack)
        client.send(msgpack_numpy.packb(oft_fields()))
        assert said in client.recv(timeout=20)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        policy.gate.set()
        first.join(20)
