"""Ready is not alive: what stops a server from acting is said; nobody waits for what is stuck."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests
from echo_policy import OFT, EchoPolicy, GatedPolicy, oft_fields, post
from gr00t_client import Gr00tClient
from metrics_pages import samples
from openpi_client import msgpack_numpy
from ports import free_port
from protocol_wires import WIRES
from rude_clients import websocket_client, zmq_request
from vla_eval_client import VlaEvalClient
from websockets.exceptions import ConnectionClosed

from jetson.board.watch import BoardWatch
from jetson.errors import RateLimited, ServerBusy, WireError
from jetson.recording.writer import McapRecorder
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving import request_queue, websocket
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

TOKEN = "correct-horse-battery-staple"


class Stuck(EchoPolicy):
    """Never returns from "hang" until it is let go."""

    def __init__(self) -> None:
        super().__init__(OFT)
        self.gate = threading.Event()

    def infer(self, observation: Observation) -> ActionChunk:
        if observation.instruction == "hang":
            self.gate.wait(60)
        return super().infer(observation)


def ready(url: str) -> tuple[int, list[str]]:
    reply = requests.get(url + "/readyz", timeout=20)
    return reply.status_code, [] if reply.status_code == 200 else reply.json()["not_ready"]


@contextmanager
def stuck_server() -> Iterator[tuple[str, Stuck]]:
    policy = Stuck()
    settings = ServerSettings(port=0, infer_timeout_s=0.2, token=TOKEN)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(policy, settings))
        stack.callback(policy.gate.set)
        yield url, policy


def asked(url: str, instruction: str) -> requests.Response:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return post(url, oft_fields(instruction=instruction), headers=headers)


def test_an_engine_that_does_not_come_back_is_alive_but_not_ready() -> None:
    with stuck_server() as (url, policy), ThreadPoolExecutor(2) as pool:
        assert ready(url) == (200, [])
        hung = pool.submit(asked, url, "hang")
        while ready(url)[0] == 200:
            time.sleep(0.01)
        assert "has not ended" in ready(url)[1][0]
        assert requests.get(url + "/healthz", timeout=20).status_code == 200
        refused = asked(url, "push")
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        assert "has not ended" in refused.json()["error"]
        policy.gate.set()
        assert hung.result(20).status_code in (200, 503)
        while ready(url)[0] != 200:
            time.sleep(0.01)
        assert asked(url, "push").status_code == 200, "and it goes on by itself"


def test_who_waits_behind_a_stuck_engine_is_told() -> None:
    with stuck_server() as (url, policy), ThreadPoolExecutor(3) as pool:
        hung = pool.submit(asked, url, "hang")
        time.sleep(0.05)
        waiting = pool.submit(asked, url, "push")
        assert waiting.result(20).status_code == 503
        policy.gate.set()
        hung.result(20)


@pytest.mark.parametrize("name", ["openpi", "vla-eval", "gr00t"])
def test_whose_own_request_is_stuck_is_told_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its thread waits for the engine; GR00T's clients share one, and ask it while it does."""
    monkeypatch.setattr(request_queue, "_LOOK_S", 0.1)
    policy, port = Stuck(), free_port()
    settings = ServerSettings(port=0, gr00t_port=port, infer_timeout_s=0.2)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(policy, settings))
        stack.callback(policy.gate.set)
        asker, other = WIRES[name](url, port), WIRES["gr00t"](url, port)
        stack.callback(asker.close)
        stack.callback(other.close)
        push = asker.encode(asker.fields())
        told = asker.send(push.replace(b"push", b"hang"))
        assert told is not None and "an inference has not ended" in told
        told = other.send(other.encode(other.fields()))
        assert told is not None and "an inference has not ended" in told
        policy.gate.set()
        while ready(url)[0] != 200:
            time.sleep(0.01)
        assert asker.send(push) is None, "and it goes on by itself"
        assert other.send(other.encode(other.fields())) is None


def test_a_recorder_or_a_board_that_is_lost_makes_it_unready(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.mcap"
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, record=path)) as url:
        assert ready(url) == (200, [])
        assert (
            samples(requests.get(url + "/metrics", timeout=20).text)["qvla_recording_up", ()] == 1
        )
        monkeypatch.setattr(McapRecorder, "failure", "OSError: No space left on device")
        monkeypatch.setattr(BoardWatch, "is_sampling", False)
        assert ready(url) == (
            503,
            ["the board is not sampled any more", "nothing is recorded any more"],
        )
        assert (
            samples(requests.get(url + "/metrics", timeout=20).text)["qvla_recording_up", ()] == 0
        )
        assert (
            "No space left"
            in requests.get(url + "/live/state", timeout=20).json()["recording"]["failure"]
        )
        assert post(url, oft_fields()).status_code == 200, "the robot goes on"


def test_the_board_thread_survives_a_failure() -> None:
    from jetson.board import read_board_state

    reads = 0

    def read() -> object:
        nonlocal reads
        reads += 1
        if reads == 2:
            raise OSError(24, "Too many open files")
        return read_board_state()

    with BoardWatch(0.01, read) as board:  # type: ignore[arg-type]
        while reads < 5:
            time.sleep(0.01)
        assert board.is_sampling


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
        harness = VlaEvalClient(url)
        stack.callback(harness.close)
        assert said in harness.ask("observation", {})["error"]
        client = websocket_client(url, stack)
        client.send(msgpack_numpy.packb(oft_fields()))
        assert said in client.recv(timeout=20)
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=20)
        assert closed.value.rcvd is not None and closed.value.rcvd.code == 1013
        policy.gate.set()
        first.join(20)


@pytest.mark.parametrize(
    ("error", "code"), [(ServerBusy("x"), 1013), (RateLimited("x"), 1013), (WireError("x"), 1011)]
)
def test_a_websocket_closes_with_whether_to_ask_again(error: QvlaError, code: int) -> None:
    assert websocket.closing_code(error) == code
