"""Descriptors that run out end nothing, and strangers cannot use them up."""

import resource
import socket
import subprocess
import sys
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import psutil
import pytest
from echo_policy import OFT, EchoPolicy
from places import ROOT

import jetson.server
import jetson.serving.connections as connections
from jetson.clients.endpoint import Endpoint
from jetson.clients.protocol_clients import open_client
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.connections import client_places
from jetson.serving.security import TlsFiles

_LIMIT = 12


def test_handshakes_count_as_connections(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE_S", 0.0)
    monkeypatch.setattr(jetson.server, "connection_limit", lambda: _LIMIT)
    monkeypatch.setenv("QVLA_TLS_CA", str(certificates / "ca.pem"))
    tls = TlsFiles(certificates / "server.pem", certificates / "server.key")
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0, tls=tls)))
        place = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        silent = [
            stack.enter_context(socket.create_connection(place, timeout=20)) for _ in range(60)
        ]
        for protocol in ("act", "openpi"):
            with closing(open_client(protocol, Endpoint.parse(url), None, 60)) as client:
                assert client.ask(OFT.blank_observation()).shape == (4, 7)
        # Those that made room read their end; the server holds no more than its limit.
        ended = 0
        for peer in silent:
            peer.setblocking(False)
            with suppress(BlockingIOError):
                with suppress(ConnectionResetError):
                    assert peer.recv(1) == b""
                ended += 1
        assert ended >= len(silent) - _LIMIT
        port = place[1]
        held = [c for c in psutil.Process().net_connections("tcp") if c.laddr[1] == port]
        assert len([c for c in held if c.status == psutil.CONN_ESTABLISHED]) <= _LIMIT + 1


def test_clients_that_stay_leave_half_of_the_places_to_other_machines() -> None:
    for limit, each in ((32, 16), (3, 1), (1, 1)):
        assert client_places(limit, "clients")._limit_each == each


_ZMQ_WITHOUT_DESCRIPTORS = """
import logging, os, resource, socket, sys, time
sys.path[:0] = ["tests/helpers"]
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
logging.basicConfig(stream=sys.stdout)
from echo_policy import OFT, EchoPolicy
from gr00t_client import Gr00tClient
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from ports import free_port
port = free_port()
with open_server(EchoPolicy(OFT), ServerSettings(port=0, gr00t_port=port)):
    # None is free, or enough for the relay and too few for libzmq, or enough.
    for free in (0, 2, 3, 4):
        client, spent = socket.socket(), []
        try:
            while True:
                spent.append(os.open(os.devnull, os.O_RDONLY))
        except OSError:
            for _ in range(free):
                os.close(spent.pop())
        client.connect(("127.0.0.1", port))
        client.sendall(b"\\xff" + bytes(8) + b"\\x7f\\x03\\x01NULL" + bytes(48))
        time.sleep(0.2)
        for descriptor in spent:
            os.close(descriptor)
        client.close()
    time.sleep(1.1)  # until it accepts again
    with Gr00tClient(port) as good:
        print("answer", good.call("ping")["status"])
"""


def test_libzmq_is_never_without_descriptors() -> None:
    """It would end the process: its accept knows no EMFILE."""
    done = subprocess.run(
        [sys.executable, "-c", _ZMQ_WITHOUT_DESCRIPTORS], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "answer ok" in done.stdout
    assert done.stdout.count("no connection can be accepted") == 1, done.stdout


def test_the_descriptors_are_raised_and_bound_the_connections(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert 8 <= connections.connection_limit() <= 512
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= soft
    monkeypatch.setattr(connections, "raise_descriptor_limit", lambda: 300)
    assert connections.connection_limit() == (300 - 192) // 3
    assert hard


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
