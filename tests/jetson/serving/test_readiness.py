"""Ready is not alive: what stops a server from acting is said; nobody waits for what is stuck."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests
from echo_policy import OFT, EchoPolicy, oft_fields, post
from metrics_pages import samples

from jetson.board.watch import BoardWatch
from jetson.recording.writer import McapRecorder
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from qvla_export.shared.action import ActionChunk
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
