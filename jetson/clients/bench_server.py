"""What the server adds to the engine: round trips with an engine that does nothing.

One client asks each server in turn, so that whatever else the machine does falls on all alike.
Every server is a process of its own on loopback; round trips are the client's, from the arrays
of an observation to the arrays of its actions.
"""

import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
import json_numpy
import numpy as np
from numpy.typing import NDArray

from jetson.clients.bench_peers import ACTIONS, serve_openpi_structure, serve_openvla_structure
from jetson.clients.endpoint import Endpoint
from jetson.clients.protocol_clients import ProtocolClient, ProtocolName, open_client
from jetson.errors import RemoteError
from jetson.server import serve
from jetson.server_settings import ServerSettings
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.artifacts import versions
from qvla_export.shared.observation import Observation

_CONTRACT = PolicyContract(("image", "wrist_image"), *ACTIONS.shape, 8, "none")
_START_S = 60.0
_PACKAGES = ("uvicorn", "starlette", "websockets", "msgpack", "pyzmq", "fastapi")


class _NoEngine:
    contract = _CONTRACT

    def infer(self, observation: Observation) -> ActionChunk:
        return ActionChunk(ACTIONS, ACTIONS)


@dataclass(frozen=True)
class ServerBenchmark:
    """Round trips of every server measured, in one run."""

    # Server -> round trips in ms, in the order they were made.
    round_trips_ms: Mapping[str, NDArray[np.float64]]
    # Pixels of a side of each of the two images.
    side: int

    def percentile(self, server: str, percent: float) -> float:
        """Return a percentile of one server's round trips, ms."""
        return float(np.percentile(self.round_trips_ms[server], percent))

    def to_json(self) -> dict[str, Any]:
        """Return figures, samples and versions."""
        servers = {
            name: {
                "p50_ms": self.percentile(name, 50),
                "p90_ms": self.percentile(name, 90),
                "p99_ms": self.percentile(name, 99),
                "max_ms": float(samples.max()),
                "round_trips_ms": [round(float(ms), 5) for ms in samples],
            }
            for name, samples in self.round_trips_ms.items()
        }
        return {
            "observation": f"two uint8 images of {self.side} x {self.side}, state of 8",
            "servers": servers,
            "versions": versions(*_PACKAGES),
        }


def measure_servers(
    count: int,
    side: int = 224,
    warmup: int = 50,
    on_progress: Callable[[int, int], None] | None = None,
) -> ServerBenchmark:
    """Ask each server `count` times, one after another in turn.

    Args:
        count: round trips to each server.
        side: pixels of a side of each image.
        warmup: round trips before those.
        on_progress: called with (rounds done, rounds in all).

    Raises:
        RemoteError: a server did not start within a minute.
    """
    order = np.random.default_rng(0)
    image = order.integers(0, 256, (side, side, 3), np.uint8)
    observation = Observation(
        {"image": image, "wrist_image": image[::-1].copy()}, "do nothing", np.zeros(8, np.float32)
    )
    with ExitStack() as stack:
        ours, gr00t, openpi, openvla = (_free_port() for _ in range(4))
        for target, arguments in (
            (_serve_ours, (ours, gr00t)),
            (serve_openpi_structure, (openpi,)),
            (serve_openvla_structure, (openvla,)),
        ):
            stack.enter_context(_run_process(target, arguments))
        clients: dict[str, _Client] = {
            "qvla websocket": _our_client("openpi", ours),
            "openpi structure": _our_client("openpi", openpi),
            "qvla POST /act": _HttpClient(ours),
            "openvla structure": _HttpClient(openvla),
            "qvla ZMQ": _our_client("gr00t", gr00t),
        }
        for client in clients.values():
            stack.callback(client.close)
        samples: dict[str, list[float]] = {name: [] for name in clients}
        for index in range(warmup + count):
            # In another order each time: who comes after whom changes what the caches hold.
            for name in order.permutation(list(clients)):
                start_ns = time.perf_counter_ns()
                clients[name].ask(observation)
                if index >= warmup:
                    samples[name].append((time.perf_counter_ns() - start_ns) / 1e6)
            if on_progress is not None:
                on_progress(index + 1, warmup + count)
    return ServerBenchmark({name: np.array(ms) for name, ms in samples.items()}, side)


class _Client(Protocol):
    def ask(self, observation: Observation) -> None: ...

    def close(self) -> None: ...


class _HttpClient:
    """Does what the clients of OpenVLA's deploy.py do."""

    def __init__(self, port: int) -> None:
        _await_port(port)
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False)

    def ask(self, observation: Observation) -> None:
        primary, wrist = observation.images.values()
        fields = {"full_image": primary, "wrist_image": wrist, "state": observation.state}
        text = json_numpy.dumps({**fields, "instruction": observation.instruction})
        headers = {"content-type": "application/json"}
        reply = self._http.post("/act", content=text, headers=headers)
        _check(np.stack(json_numpy.loads(reply.content)).astype(np.float32).tobytes())

    def close(self) -> None:
        self._http.close()


class _OurClient:
    """One of the clients that also measure servers under load."""

    def __init__(self, client: ProtocolClient) -> None:
        self._client = client
        self.close = client.close

    def ask(self, observation: Observation) -> None:
        _check(self._client.ask(observation).tobytes())


def _our_client(protocol: ProtocolName, port: int) -> _OurClient:
    _await_port(port)
    return _OurClient(open_client(protocol, Endpoint("127.0.0.1", port), None, _START_S))


def _check(actions: bytes) -> None:
    if actions != ACTIONS.tobytes():
        raise RemoteError("a server under measurement answered something else than its actions")


def _serve_ours(port: int, gr00t_port: int) -> None:
    # The limit would be what is measured; its cost is not left out.
    settings = ServerSettings(port=port, gr00t_port=gr00t_port, max_rate_hz=1e9)
    serve(_NoEngine(), settings)


@contextmanager
def _run_process(target: Callable[..., None], arguments: tuple[int, ...]) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(
        target=target, args=arguments, daemon=True
    )
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _await_port(port: int) -> None:
    end_s = time.monotonic() + _START_S
    while time.monotonic() < end_s:
        with socket.socket() as client:
            if client.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RemoteError(f"the server on port {port} did not start within {_START_S:g} s; see its log")
