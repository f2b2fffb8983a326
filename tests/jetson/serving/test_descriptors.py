"""Descriptors that run out end nothing, and strangers cannot use them up."""

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
