"""Many actions through two protocols at once, with clients that vanish and an engine that fails."""

import json
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from typing import Any

import json_numpy
import msgpack
import numpy as np
import psutil
import pytest
import soak_server
from gr00t_client import Gr00tClient, npy
from openpi_client import msgpack_numpy
from ports import free_port
from websockets.sync.client import connect

IMAGE = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
# Actions of each protocol between one measurement of memory and the next.
_SPAN = 250


@dataclass(frozen=True)
class Soak:
    actions: int
    disconnects: int
    failures: int


@dataclass(frozen=True)
class ServedRequest:
    port: int
    gr00t_port: int
    process: psutil.Process


@pytest.fixture
def served() -> Iterator[ServedRequest]:
    ports = free_port(), free_port()
    process = multiprocessing.get_context("spawn").Process(
        target=soak_server.run, args=ports, daemon=True
    )
    process.start()
    end_s = time.monotonic() + 60
    while time.monotonic() < end_s:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", ports[0])) == 0:
                break
        time.sleep(0.05)
    yield ServedRequest(*ports, psutil.Process(process.pid))
    process.terminate()
    process.join(20)
    assert process.exitcode == 0, "the server did not drain and end well"


def fields(client: int, number: int, instruction: str = "go") -> dict[str, Any]:
    state = np.array([client, number], np.float32)
    return {"image": IMAGE, "wrist_image": IMAGE, "state": state, "instruction": instruction}


class OpenpiSoak:
    def __init__(self, served: ServedRequest) -> None:
        self.address = f"ws://127.0.0.1:{served.port}"
        self.open()

    def open(self) -> None:
        self.manager = connect(self.address, compression=None, max_size=None, proxy=None)
        self.socket = self.manager.__enter__()
        self.socket.recv(timeout=30)

    def ask(self, request: dict[str, Any]) -> Any:
        self.socket.send(msgpack_numpy.packb(request))
        reply = self.socket.recv(timeout=30)
        if isinstance(reply, bytes):
            return msgpack_numpy.unpackb(reply)["actions"]
        self.close()
        self.open()
        return reply

    def close(self) -> None:
        self.manager.__exit__(None, None, None)


class ActSoak:
    def __init__(self, served: ServedRequest) -> None:
        self.http = HTTPConnection("127.0.0.1", served.port, timeout=30)

    def ask(self, request: dict[str, Any]) -> Any:
        self.http.request("POST", "/act", json_numpy.dumps(request))
        reply = self.http.getresponse()
        content = reply.read()
        if reply.status == 200:
            return np.stack(json_numpy.loads(content))
        return json.loads(content)["error"]

    def close(self) -> None:
        self.http.close()


def stream(client: Any, identity: int, soak: Soak, on_span: Callable[[], None]) -> None:
    """Ask one request after another; each reply must be that of its own request."""
    every = max(soak.actions // max(soak.failures, 1), 1)
    for number in range(soak.actions // 2):
        if number % every == every // 2:
            assert "now and then" in client.ask(fields(identity, number, "fail"))
        actions = client.ask(fields(identity, number))
        np.testing.assert_array_equal(actions[:, :2], [[identity, number]] * 2)
        if number % _SPAN == 0:
            on_span()
    client.close()


def disconnect(served: ServedRequest, index: int) -> None:
    """Leave in the middle of a request, or right after it, in each protocol."""
    request = fields(9, index)
    if index % 3 == 0:
        manager = connect(f"ws://127.0.0.1:{served.port}", compression=None, proxy=None)
        client = manager.__enter__()
        client.recv(timeout=30)
        client.send(msgpack_numpy.packb(request))
        client.socket.close()
    elif index % 3 == 1:
        body = json_numpy.dumps(request).encode()
        head = f"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as client:
            client.sendall(head.encode() + body[: len(body) // (1 + index % 2)])
    else:
        with Gr00tClient(served.gr00t_port) as client:
            seen = {
                "video": {name: npy(IMAGE[None, None]) for name in ("image", "wrist_image")},
                "state": {"state": npy(request["state"][None, None])},
                "language": {"task": [["go"]]},
            }
            client.socket.send(msgpack.packb({"data": {"observation": seen}}))


@pytest.mark.parametrize(
    "soak",
    [
        pytest.param(Soak(1_000, 12, 4), id="short"),
        pytest.param(
            Soak(50_000, 200, 20), id="long", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]
        ),
    ],
)
def test_soak(served: ServedRequest, soak: Soak) -> None:
    resident: list[int] = []
    with ThreadPoolExecutor(3) as pool:
        streams = [
            pool.submit(
                stream, OpenpiSoak(served), 1, soak,
                lambda: resident.append(served.process.memory_info().rss),
            ),
            pool.submit(stream, ActSoak(served), 2, soak, lambda: None),
        ]  # fmt: skip
        pause_s = soak.actions / soak.disconnects / 1000
        for index in range(soak.disconnects):
            disconnect(served, index)
            time.sleep(pause_s)
        for asked in streams:
            asked.result()
    half = np.array(resident[len(resident) // 2 :]) / 1e6
    if soak.actions >= 10_000:
        slope_mb = np.polyfit(np.arange(len(half)) * 2 * _SPAN, half, 1)[0] * 10_000
        print(f"resident {half[0]:.1f} -> {half[-1]:.1f} MB, {slope_mb:.3f} MB per 10,000")
        assert slope_mb < 1
    threads = served.process.num_threads()
    assert threads < 30, "threads of clients that left are still there"
