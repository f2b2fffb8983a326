"""When the port opens and closes, and which settings are refused."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import requests
from echo_policy import OFT, EchoPolicy, oft_fields, post
from places import HELPERS, ROOT
from ports import free_port

from jetson import server
from jetson.errors import PolicyFailure, RefusedSetting
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.service import ActionService
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation


def test_the_port_opens_only_after_warm_up() -> None:
    port = free_port()
    refused: list[int] = []

    class Probing(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            with socket.socket() as client:
                refused.append(client.connect_ex(("127.0.0.1", port)))
            return super().infer(observation)

    with open_server(Probing(OFT), ServerSettings(port=port, warmup=2)) as url:
        assert len(refused) == 2 and 0 not in refused
        assert post(url, oft_fields()).status_code == 200
        assert refused[2:] == [0]


def test_a_policy_that_cannot_act_never_opens_the_port() -> None:
    class Broken(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            raise RuntimeError("no kernel image")

    with (
        pytest.raises(PolicyFailure, match="no kernel image"),
        open_server(Broken(OFT), ServerSettings(port=0)),
    ):
        pass


def test_a_taken_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = ServerSettings(port=taken.getsockname()[1])
        with (
            pytest.raises(RefusedSetting, match=r"choose another --port"),
            open_server(EchoPolicy(OFT), settings),
        ):
            pass


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.7", "::", "robot.local", ""])
def test_remote_addresses_need_a_token(host: str) -> None:
    with pytest.raises(RefusedSetting, match="nothing keeps them out"):
        ServerSettings(host=host)
    assert ServerSettings(host=host, token="t" * 16).host == host


@pytest.mark.parametrize(
    "change",
    [
        {"port": -1},
        {"port": 70_000},
        {"gr00t_port": 0},
        {"gr00t_port": 70_000},
        {"reply": "all"},
        {"max_body_bytes": 0},
        {"max_pending": 0},
        {"max_rate_hz": -1.0},
        {"max_rate_hz": float("nan")},
    ],
)
def test_impossible_settings_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RefusedSetting, match=next(iter(change))):
        ServerSettings(**change)


def test_a_policy_must_say_what_it_needs() -> None:
    with pytest.raises(RefusedSetting, match="contract"):
        ActionService(object())  # type: ignore[arg-type]


SCRIPT = """
import logging, sys, time
sys.path[:0] = [{root!r}, {helpers!r}]
from jetson.server import serve
from jetson.server_settings import ServerSettings
from echo_policy import OFT, EchoPolicy

logging.basicConfig(level=logging.INFO)
class Slow(EchoPolicy):
    def infer(self, observation):
        print("acting", file=sys.stderr, flush=True)
        time.sleep(0.4)
        return super().infer(observation)

serve(Slow(OFT), ServerSettings(port=0, warmup=1))
assert not {{"torch", "onnx", "transformers"}} & {{*sys.modules}}
print("drained", flush=True)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_requests_under_way_finish(number: signal.Signals) -> None:
    script = SCRIPT.format(root=str(ROOT), helpers=str(HELPERS))
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None and process.stdout is not None
        line = next(line for line in process.stderr if "serving on" in line)
        url = line.split()[-1]
        answers: list[requests.Response] = []
        client = threading.Thread(target=lambda: answers.append(post(url, oft_fields())))
        client.start()
        next(line for line in process.stderr if "acting" in line)
        process.send_signal(number)
        client.join()
        assert answers[0].status_code == 200
        assert "drained" in process.stdout.read()
        process.stderr.read()
        assert process.wait(20) == 0
    with pytest.raises(requests.ConnectionError):
        requests.get(url + "/healthz", timeout=5)


def test_holes_that_peers_left_in_the_heap_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    # At every look around instead of every twenty seconds.
    monkeypatch.setattr(server, "_RETURN_MEMORY_S", 0)
    # Too large for Python's own blocks, too small to be mapped by themselves.
    pieces = [bytes(4096) for _ in range(25_000)]
    held = resident_bytes()
    del pieces[::2], pieces[1::2]
    assert resident_bytes() > held - 20_000_000
    with open_server(EchoPolicy(OFT), ServerSettings(port=0)):
        end_s = time.monotonic() + 60
        while resident_bytes() > held - 20_000_000 and time.monotonic() < end_s:
            time.sleep(0.05)
    assert resident_bytes() < held - 20_000_000 and pieces


def resident_bytes() -> int:
    """Return the memory that this process holds."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")
