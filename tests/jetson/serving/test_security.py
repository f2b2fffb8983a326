"""Who gets an action and who does not: tokens, certificates, Host, Origin, rates, pickles."""

import ast
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from echo_policy import IMAGE, OFT, EchoPolicy, oft_fields, post
from hypothesis import given
from hypothesis import strategies as st
from openpi_client import msgpack_numpy
from places import ROOT
from typer.testing import CliRunner
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

import jetson.serving.event_loop
from jetson.clients.endpoint import Endpoint
from jetson.clients.http_client import RemotePolicy
from jetson.clients.protocol_clients import open_client
from jetson.errors import Forbidden, RateLimited, RefusedSetting, RemoteError, Unauthorized
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.security import (
    RateLimit,
    TlsFiles,
    check_authorization,
    check_host,
    check_origin,
    read_token,
)
from qvla_export.cli.app import app
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

TOKEN = "correct-horse-battery-staple"
OBSERVATION = Observation({"front": IMAGE, "hand": IMAGE}, "push", np.zeros(8, np.float32))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    settings = ServerSettings(port=0, token=TOKEN, allowed_hosts=("robot.local",))
    with open_server(EchoPolicy(OFT), settings) as url:
        yield url


@pytest.fixture(scope="module")
def open_url() -> Iterator[str]:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url:
        yield url


def upgrade(url: str, **headers: str) -> int:
    """Return the status of a websocket handshake."""
    address = url.replace("http", "ws", 1) + "/healthz"
    try:
        with connect(address, additional_headers=headers or None, proxy=None):
            return 101
    except InvalidStatus as refused:
        assert refused.response.body and b'"error"' in refused.response.body
        return refused.response.status_code


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("", 401),
        (TOKEN, 401),
        (f"Basic {TOKEN}", 401),
        (f"Bearer {TOKEN[:-1]}", 401),
        (f"Bearer {TOKEN}x", 401),
        ("Bearer é", 401),
        (f"Bearer {TOKEN}", 200),
        (f"bearer {TOKEN}", 200),
        (f"Api-Key {TOKEN}", 200),
    ],
)
def test_the_token_opens_http_and_websockets(url: str, header: str | None, status: int) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    reply = post(url, oft_fields(), headers=headers)
    assert reply.status_code == status
    assert (reply.json()["kind"] == "Unauthorized") if status == 401 else len(reply.json()) == 4
    assert requests.get(url + "/metadata", headers=headers, timeout=20).status_code == status
    if header is None or header.isascii():
        given = {} if header is None else {"Authorization": header}
        assert upgrade(url, **given) == (101 if status == 200 else 401)


def test_health_needs_no_token_and_says_nothing(url: str) -> None:
    assert requests.get(url + "/healthz", timeout=20).content == b"OK\n"


def test_the_remote_policy_sends_the_token(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with RemotePolicy(url, token=TOKEN) as policy:
        assert policy.infer(OBSERVATION).actions.shape == (4, 7)
    with pytest.raises(RemoteError, match=r"401.*Bearer"):
        RemotePolicy(url)
    monkeypatch.setenv("QVLA_TOKEN", TOKEN)
    with RemotePolicy(url) as policy:
        assert policy.infer(OBSERVATION).actions.shape == (4, 7)


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("localhost", None, 200),
        ("LOCALHOST:8000", None, 200),
        ("127.0.0.1:9", None, 200),
        ("[::1]:8000", None, 200),
        ("evil.example", None, 403),
        ("localhost.evil.example", None, 403),
        ("127.0.0.1.evil.example:80", None, 403),
        ("robot.local", None, 403),
        ("", None, 403),
        ("localhost:8000", "http://localhost:8000", 200),
        ("localhost:8000", "http://localhost:9000", 403),
        ("localhost:8000", "https://evil.example", 403),
        ("localhost:8000", "null", 403),
        ("localhost:8000", "", 403),
    ],
)
def test_rebound_names_and_foreign_pages_are_refused(
    open_url: str, host: str, origin: str | None, status: int
) -> None:
    headers = {"host": host, **({} if origin is None else {"origin": origin})}
    reply = post(open_url, oft_fields(), headers=headers)
    assert reply.status_code == status
    assert status == 200 or reply.json()["kind"] == "Forbidden"
    shaken = raw_upgrade(open_url, headers)
    assert shaken == (101 if status == 200 else 403)


def raw_upgrade(url: str, headers: dict[str, str]) -> int:
    """Shake hands with a Host of one's own, which no client library lets one choose."""
    host, port = url.removeprefix("http://").split(":")
    lines = [f"{name}: {value}" for name, value in headers.items()]
    key = ["Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    secret = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="
    request = "\r\n".join(["GET / HTTP/1.1", *lines, *key, secret, "", ""])
    with socket.create_connection((host, int(port)), timeout=20) as client:
        client.sendall(request.encode())
        return int(client.recv(1000).split()[1])


def test_a_named_host_is_allowed(url: str) -> None:
    headers = {"authorization": f"Bearer {TOKEN}", "host": "Robot.local:8000"}
    assert post(url, oft_fields(), headers=headers).status_code == 200


@given(st.text())
def test_no_other_text_is_a_token(text: str) -> None:
    if text not in (f"Bearer {TOKEN}", f"Api-Key {TOKEN}"):
        with pytest.raises(Unauthorized):
            check_authorization(text, TOKEN)
    check_authorization(f"Bearer {TOKEN}", TOKEN)


@given(st.one_of(st.none(), st.text()), st.one_of(st.none(), st.text()))
def test_whatever_hosts_and_origins_hold_they_are_judged(host: Any, origin: Any) -> None:
    for check in (lambda: check_host(host, ("robot",)), lambda: check_origin(origin, host)):
        try:
            check()
        except Forbidden as error:
            assert str(error)


@given(st.floats(0.5, 100), st.lists(st.floats(0, 2), min_size=1, max_size=200))
def test_no_peer_exceeds_its_rate(rate_hz: float, pauses_s: list[float]) -> None:
    now_s, passed = 0.0, 0
    limit = RateLimit(rate_hz, lambda: now_s)
    for pause_s in pauses_s:
        now_s += pause_s
        try:
            limit.take("robot")
            passed += 1
        except RateLimited:
            limit.take("another peer")  # has a bucket of its own, at least until it is empty
            break
    assert passed <= max(2 * rate_hz, 1) + rate_hz * now_s + 1e-6


def test_many_peers_are_not_all_remembered() -> None:
    limit = RateLimit(1.0, lambda: 0.0)
    for index in range(5000):
        limit.take(str(index))
    assert len(limit._buckets) <= 1024


def test_too_many_requests_are_told_to_wait() -> None:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, max_rate_hz=0.01)) as url:
        assert post(url, oft_fields()).status_code == 200
        reply = post(url, oft_fields(), headers={"x-forwarded-for": "192.0.2.7"})
        assert reply.status_code == 429 and "--max-rate-hz" in reply.json()["error"]
        assert requests.get(url + "/healthz", timeout=20).status_code == 200


def test_token_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "token"
    file.write_text(TOKEN + "\n")
    file.chmod(0o600)
    assert read_token(file) == TOKEN
    file.chmod(0o644)
    with pytest.raises(RefusedSetting, match="chmod 600"):
        read_token(file)
    file.chmod(0o600)
    for content in ("", "short", "ü" * 20, "two words of a token"):
        file.write_text(content)
        with pytest.raises(RefusedSetting, match="token"):
            read_token(file)
    with pytest.raises(RefusedSetting, match="openssl rand"):
        read_token(tmp_path / "missing")
    monkeypatch.delenv("QVLA_TOKEN", raising=False)
    assert read_token() is None
    monkeypatch.setenv("QVLA_TOKEN", TOKEN)
    assert read_token() == TOKEN


def test_the_token_is_not_shown() -> None:
    settings = ServerSettings(token=TOKEN)
    assert TOKEN not in repr(settings)
    with pytest.raises(RefusedSetting) as refused:
        ServerSettings(token="secret")
    assert "secret" not in str(refused.value)


def test_zmq_on_a_remote_address_needs_the_token(certificates: Path) -> None:
    tls = tls_files(certificates)
    assert ServerSettings(host="0.0.0.0", tls=tls).token is None
    with pytest.raises(RefusedSetting, match="ZMQ"):
        ServerSettings(host="0.0.0.0", tls=tls, gr00t_port=5555)
    with pytest.raises(RefusedSetting, match="nothing keeps them out"):
        ServerSettings(host="0.0.0.0", tls=replace(tls, client_ca=None))


def test_no_module_of_the_robot_unpickles() -> None:
    for path in [*(ROOT / "jetson").rglob("*.py"), *(ROOT / "engines").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
                assert not names & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}
            if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
                assert ast.unparse(node.value) == "False", path


def tls_files(folder: Path) -> TlsFiles:
    return TlsFiles(folder / "server.pem", folder / "server.key", folder / "ca.pem")


def test_handshakes_that_never_end_hold_no_thread_and_are_closed(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jetson.serving.event_loop, "HANDSHAKE_TIMEOUT_S", 0.5)
    monkeypatch.setenv("QVLA_TLS_CA", str(certificates / "ca.pem"))
    tls = TlsFiles(certificates / "server.pem", certificates / "server.key")
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0, tls=tls)))
        address = ("127.0.0.1", int(url.rsplit(":", 1)[1]))
        before = threading.active_count()
        peers = []
        for number in range(40):
            peer = stack.enter_context(socket.create_connection(address, timeout=60))
            peer.sendall((b"", b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/1.1\r\n")[number % 3])
            peers.append(peer)
        assert threading.active_count() == before
        for protocol in ("act", "openpi"):
            with closing(open_client(protocol, Endpoint.parse(url), None, 60)) as client:
                assert client.ask(OFT.blank_observation()).shape == (4, 7)
        for peer in peers:
            with suppress(ConnectionResetError):
                # Of those that spoke, an alert comes first.
                while peer.recv(100):
                    pass


def test_client_certificates_open_https_and_websockets(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServerSettings(port=0, tls=tls_files(certificates))
    message = msgpack_numpy.packb(oft_fields())
    with open_server(EchoPolicy(OFT), settings) as url:
        assert url.startswith("https://")
        monkeypatch.setenv("QVLA_TLS_CA", str(certificates / "ca.pem"))
        with pytest.raises(RemoteError):
            RemotePolicy(url)
        for name, known in (("stranger", False), ("client", True)):
            monkeypatch.setenv("QVLA_TLS_CERT", str(certificates / f"{name}.pem"))
            monkeypatch.setenv("QVLA_TLS_KEY", str(certificates / f"{name}.key"))
            if not known:
                with pytest.raises(RemoteError):
                    RemotePolicy(url)
                continue
            for protocol in ("act", "openpi"):
                with closing(open_client(protocol, Endpoint.parse(url), None, 60)) as client:
                    assert client.ask(OBSERVATION).shape == (4, 7)
        context = ssl.create_default_context(cafile=certificates / "ca.pem")
        context.load_cert_chain(certificates / "client.pem", certificates / "client.key")
        with connect(url.replace("https", "wss"), ssl=context, proxy=None, max_size=None) as client:
            client.recv(timeout=20)
            for _ in range(3):
                client.send(message)
                reply = msgpack_numpy.unpackb(client.recv(timeout=20))
                assert reply["actions"].shape == (4, 7)


def test_an_encrypted_client_that_does_not_read_fills_no_memory(certificates: Path) -> None:
    """What waits for it waits in its own thread, not in the event loop."""
    policy = EchoPolicy(PolicyContract(("front", "hand"), 4096, 64, 8, "tiny"))
    calls: list[None] = []
    infer = policy.infer
    policy.infer = lambda observation: (calls.append(None), infer(observation))[1]  # type: ignore[method-assign]
    files = TlsFiles(certificates / "server.pem", certificates / "server.key")
    context = ssl.create_default_context(cafile=certificates / "ca.pem")
    message = msgpack_numpy.packb(oft_fields())
    with open_server(policy, ServerSettings(port=0, tls=files)) as url:
        before = len(calls)
        with connect(
            url.replace("https", "wss"), ssl=context, proxy=None, max_size=None, max_queue=1
        ) as client:
            client.recv(timeout=20)
            for _ in range(80):  # two megabytes of reply each
                client.send(message)
            while len(calls) - before < 2:
                time.sleep(0.01)
            time.sleep(1.0)
            assert len(calls) - before < 40
            client.socket.shutdown(socket.SHUT_RDWR)


def test_tls_files_must_fit(certificates: Path, tmp_path: Path) -> None:
    with pytest.raises(RefusedSetting, match="PEM"):
        TlsFiles(certificates / "server.pem", certificates / "client.key")
    with pytest.raises(RefusedSetting, match="PEM"):
        TlsFiles(tmp_path / "missing.pem", tmp_path / "missing.key")


def test_the_command_line_takes_no_token() -> None:
    text = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    assert "--token-file" in text and "--token " not in text and "--allow-remote" not in text


def test_the_command_line_wants_certificate_and_key_together(
    tmp_path: Path, certificates: Path
) -> None:
    # Both are there: what is missing is refused before anything is read.
    arguments = ["serve", str(tmp_path), "--tls-cert", str(certificates / "server.pem")]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, QvlaError) and "--tls-key" in str(done.exception)
