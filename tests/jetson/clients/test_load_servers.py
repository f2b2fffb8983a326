"""Loads on real servers over every protocol; where time matters it is virtual."""

import json
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from echo_policy import OFT, EchoPolicy
from ports import free_port
from typer.testing import CliRunner

from jetson.clients.endpoint import Endpoint
from jetson.clients.load import LoadPlan, LoadTimes, random_observations, run_load
from jetson.clients.load_result import LoadResult
from jetson.clients.protocol_clients import (
    ProtocolClient,
    ProtocolName,
    contract_of_client,
    open_client,
)
from jetson.clients.websocket_clients import OpenpiClient
from jetson.control.loop_clock import SimulatedClock
from jetson.errors import RemoteError
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.policy_contract import PolicyContract
from qvla_export.cli.app import app
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

PROTOCOLS: tuple[ProtocolName, ...] = get_args(ProtocolName)
TOKEN = "a-token-that-is-long-enough"
# Nothing here waits for it but where no reply can come.
PATIENT_S = 60.0


@contextmanager
def served(policy: Any, **settings: Any) -> Iterator[dict[ProtocolName, Endpoint]]:
    gr00t_port = free_port()
    with open_server(
        policy, ServerSettings(port=0, gr00t_port=gr00t_port, max_rate_hz=0, **settings)
    ) as url:
        http = Endpoint.parse(url)
        gr00t = Endpoint("127.0.0.1", gr00t_port)
        yield {"act": http, "openpi": http, "gr00t": gr00t, "vla-eval": http}


def small_observations(count: int = 1) -> list[Observation]:
    return random_observations(OFT, 8, count)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_stall_shows_in_all_that_was_due_in_it(protocol: ProtocolName) -> None:
    clock = SimulatedClock()

    class Stalling(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            # Time passes here only, while the generator waits for the reply.
            clock.time_s += 0.3 if observation.instruction == "stall" else 0.001
            return super().infer(observation)

    (usual,) = small_observations()
    stall = Observation(usual.images, "stall", usual.state)
    plan = LoadPlan(100, 0.6)
    with (
        served(Stalling(OFT)) as endpoints,
        closing(open_client(protocol, endpoints[protocol], None, PATIENT_S)) as client,
    ):

        def ask(index: int) -> None:
            client.ask(stall if index == 10 else usual)

        times = run_load([ask], plan, clock)
    result = LoadResult(protocol, "there", plan, times)
    np.testing.assert_allclose(
        result.corrected_ms[10:43], [300 - 9 * k for k in range(33)], atol=1e-6
    )
    assert (result.corrected_ms > 100).sum() == 23
    assert (result.service_ms > 100).sum() == 1
    assert result.has_reply.all()


@pytest.mark.parametrize("protocol", ["act", "openpi"])
def test_a_server_that_dies_midway(protocol: ProtocolName) -> None:
    plan, clock = LoadPlan(100, 0.3), SimulatedClock()
    (seen,) = small_observations()
    with ExitStack() as life:
        endpoints = life.enter_context(served(EchoPolicy(OFT)))
        client = open_client(protocol, endpoints[protocol], None, PATIENT_S)

        def ask(index: int) -> None:
            if index == 10:
                life.close()
            client.ask(seen)

        with closing(client):
            times = run_load([ask], plan, clock)
    result = LoadResult(protocol, "there", plan, times, deadline_ms=1000)
    assert result.has_reply.tolist() == [True] * 10 + [False] * 20
    assert sum(result.reasons.values()) == 20
    assert all(reason.startswith("RemoteError") for reason in result.reasons)
    assert result.misses is not None and result.misses.longest_run == 20


def test_a_connection_comes_back_with_its_server() -> None:
    (seen,) = small_observations()
    port = free_port()
    with open_server(EchoPolicy(OFT), ServerSettings(port=port)):
        client = OpenpiClient(Endpoint("127.0.0.1", port), None, PATIENT_S)
    with closing(client):
        with pytest.raises(RemoteError):
            client.ask(seen)
        with open_server(EchoPolicy(OFT), ServerSettings(port=port)):
            assert client.ask(seen).shape == (4, 7)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_many_connections_each_get_their_own_replies(protocol: ProtocolName) -> None:
    plan = LoadPlan(400, 0.25, clients=3, grace_s=PATIENT_S)
    observations = small_observations(100)
    first_pixels: list[float] = [-1.0] * 100
    with served(EchoPolicy(OFT)) as endpoints, ExitStack() as stack:
        asks = []
        for _ in range(plan.clients):
            client = stack.enter_context(
                closing(open_client(protocol, endpoints[protocol], None, PATIENT_S))
            )

            def ask(index: int, client: ProtocolClient = client) -> None:
                first_pixels[index] = float(client.ask(observations[index])[0, 0])

            asks.append(ask)
        times = run_load(asks, plan)
    assert not times.failures
    assert first_pixels == [float(o.images["front"][0, 0, 0]) for o in observations]
    # Never before it is due, whatever the machine does.
    assert (times.sent_s >= times.due_s).all() and (times.done_s >= times.sent_s).all()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_requests_that_fail_say_why(protocol: ProtocolName) -> None:
    (usual,) = small_observations()
    failing = Observation(usual.images, "fail", usual.state)
    plan = LoadPlan(100, 0.09)
    with (
        served(EchoPolicy(OFT)) as endpoints,
        closing(open_client(protocol, endpoints[protocol], None, PATIENT_S)) as client,
    ):

        def ask(index: int) -> None:
            client.ask(failing if index % 3 == 1 else usual)

        times: LoadTimes = run_load([ask], plan, SimulatedClock())
    assert sorted(times.failures) == [1, 4, 7]
    assert all("the engine is on fire" in reason for reason in times.failures.values())


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_tokens(protocol: ProtocolName) -> None:
    (seen,) = small_observations()
    with served(EchoPolicy(OFT), token=TOKEN) as endpoints:
        for wrong in (None, TOKEN[::-1]):
            # /metadata of HTTP is behind the token as well; GR00T asks for its modalities.
            with pytest.raises(RemoteError, match="token"):
                open_client(protocol, endpoints[protocol], wrong, PATIENT_S)
        with closing(open_client(protocol, endpoints[protocol], TOKEN, PATIENT_S)) as client:
            assert client.ask(seen).shape == (1 if protocol == "vla-eval" else 4, 7)


@contextmanager
def plain_web_server() -> Iterator[Endpoint]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_error(404, "nothing here")

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield Endpoint("127.0.0.1", server.server_address[1])
        finally:
            server.shutdown()
            thread.join()


def test_another_protocol_than_the_server_s() -> None:
    with plain_web_server() as endpoint:
        for protocol in ("act", "openpi"):
            with pytest.raises(RemoteError, match="404"):
                open_client(protocol, endpoint, None, PATIENT_S)
        # ZMQ waits for a peer that speaks it.
        with pytest.raises(RemoteError, match=r"no reply within 0\.3 s; is a `qvla serve --gr00t"):
            open_client("gr00t", endpoint, None, 0.3)
    with served(EchoPolicy(OFT)) as endpoints:
        for protocol in ("act", "openpi"):
            with pytest.raises(RemoteError, match="failed"):
                open_client(protocol, endpoints["gr00t"], None, 0.3)


@pytest.mark.parametrize("text", ["robot", "robot:0x", ":80", "ftp://robot:80", "robot:99999"])
def test_endpoints_that_are_none(text: str) -> None:
    with pytest.raises(RemoteError, match="HOST:PORT"):
        Endpoint.parse(text)


def test_endpoints() -> None:
    assert Endpoint.parse("robot:8000").url("http") == "http://robot:8000"
    assert Endpoint.parse("https://robot:8000").url("ws") == "wss://robot:8000"
    assert Endpoint.parse("[::1]:5555").url("tcp") == "tcp://[::1]:5555"


def test_what_a_server_says_of_itself() -> None:
    with served(EchoPolicy(OFT)) as endpoints:
        said = {}
        for protocol in PROTOCOLS:
            with closing(open_client(protocol, endpoints[protocol], None, PATIENT_S)) as client:
                said[protocol] = contract_of_client(client)
    assert said == {"act": OFT, "openpi": OFT, "gr00t": None, "vla-eval": None}
    (seen,) = random_observations(PolicyContract(("front",), 1, 1, 0, "tiny"), 5, 1)
    assert seen.images["front"].shape == (5, 5, 3) and not seen.state.size


def run_command(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["load", *arguments], catch_exceptions=False)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QVLA_TOKEN", TOKEN)
    output, recording = tmp_path / "load.json", tmp_path / "run.mcap"
    quick = ["--rate", "100", "--duration", "0.2", "--clients", "2", "--timeout", "60"]
    quick += ["--output", str(output)]
    with served(EchoPolicy(OFT), token=TOKEN, record=recording) as endpoints:
        http = endpoints["act"]
        address = f"{http.host}:{http.port}"
        done = run_command(address, "--protocol", "act", *quick, "--deadline-ms", "60000")
        assert done.exit_code == 0, done.output
        assert "20 of 20 requests answered" in done.output and "missed" in done.output
        saved = json.loads(output.read_text())
        assert saved["misses"]["count"] == 0 and saved["answered"] == 20
        assert saved["plan"]["clients"] == 2 and saved["asked_hz"] == pytest.approx(100)
        unwritten = run_command(address, "--protocol", "act", *quick[:6])
        assert unwritten.exit_code == 0 and "->" not in unwritten.output
        # From here on the token is in a file.
        monkeypatch.delenv("QVLA_TOKEN")
        key = tmp_path / "token"
        key.write_text(TOKEN)
        key.chmod(0o600)
        quick += ["--token-file", str(key)]
        gr00t = f"127.0.0.1:{endpoints['gr00t'].port}"
        ported = ["--metadata-port", str(http.port), "--arrivals", "poisson", "--side", "9"]
        done = run_command(gr00t, "--protocol", "gr00t", *quick, *ported)
        assert done.exit_code == 0, done.output
        assert "2 random images of 9 x 9" in json.loads(output.read_text())["observations"]
        with pytest.raises(Exception, match="give --metadata-port"):
            run_command(gr00t, "--protocol", "gr00t", *quick)
        with pytest.raises(Exception, match="give --metadata-port"):
            run_command(address, "--protocol", "vla-eval", *quick)
        done = run_command(address, "--protocol", "vla-eval", *quick, *ported)
        assert done.exit_code == 0, done.output
        assert "15 of 15 requests answered" in done.output
    with served(EchoPolicy(OFT), token=TOKEN) as endpoints:
        address = f"127.0.0.1:{endpoints['openpi'].port}"
        done = run_command(address, *quick, "--recording", str(recording))
        assert done.exit_code == 0, done.output
        assert json.loads(output.read_text())["observations"] == "run.mcap"
