"""`/metrics`: what Prometheus reads is what was served."""

import threading
from typing import Any

import pytest
import requests
from echo_policy import OFT, OPENVLA, EchoPolicy, oft_fields, post
from metrics_pages import TOKEN, acted, samples

from jetson.board import BoardState, read_board_state
from jetson.board.watch import BoardWatch
from jetson.errors import PolicyFailure, ServerBusy
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.metrics import SPAN_BUCKETS_S, Metrics, board_figures
from jetson.serving.request_observer import Observers, ServedRequest


def metrics(**options: Any) -> Metrics:
    state = read_board_state()
    return Metrics(OPENVLA, lambda: state, **options)


def read(found: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return samples(found.render()[0].decode())


def test_spans_are_counted_in_seconds_and_buckets() -> None:
    counted = metrics()
    for engine_ms in (0.05, 3.0, 3.0, 9_000.0):
        counted.on_request(acted(engine=engine_ms, total=engine_ms + 1))
    page = read(counted)
    assert page["qvla_actions_total", ()] == 4
    assert page["qvla_stage_seconds_count", (("stage", "engine"),)] == 4
    assert page["qvla_stage_seconds_sum", (("stage", "engine"),)] == pytest.approx(9.00605)
    for bucket_s in SPAN_BUCKETS_S:
        below = sum(ms / 1000 <= bucket_s for ms in (0.05, 3.0, 3.0, 9_000.0))
        labels = (("le", str(float(bucket_s))), ("stage", "engine"))
        assert page["qvla_stage_seconds_bucket", labels] == below


def test_misses_errors_and_drops() -> None:
    dropped = 0
    counted = metrics(deadline_ms=20.0, recording_drops=lambda: dropped)
    for total_ms in (19.9, 20.0, 20.1, 500.0):
        counted.on_request(acted(total=total_ms))
    counted.on_request(ServedRequest(None, None, {"total": 900.0}, PolicyFailure("on fire")))
    for _ in range(3):
        counted.on_request(ServedRequest(None, None, {}, ServerBusy("full")))
    dropped = 5
    read(counted)
    dropped = 7
    page = read(counted)
    assert page["qvla_deadline_misses_total", ()] == 2
    assert page["qvla_actions_total", ()] == 4
    assert page["qvla_errors_total", (("kind", "PolicyFailure"),)] == 1
    assert page["qvla_errors_total", (("kind", "ServerBusy"),)] == 3
    assert page["qvla_drops_total", (("what", "request"),)] == 3
    assert page["qvla_drops_total", (("what", "recording"),)] == 7


def test_a_policy_that_invents_spans_does_not_fill_the_memory() -> None:
    counted = metrics()
    for index in range(500):
        counted.on_request(acted(**{f"stage{index}": 1.0}, total=1.0))
    stages = {labels for name, labels in read(counted) if name == "qvla_stage_seconds_count"}
    assert len(stages) == 64


def test_threads_lose_no_count() -> None:
    counted = metrics()
    threads = [
        threading.Thread(target=lambda: [counted.on_request(acted(total=1)) for _ in range(500)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    page = read(counted)
    assert page["qvla_actions_total", ()] == 2000
    assert page["qvla_stage_seconds_count", (("stage", "total"),)] == 2000


def test_every_number_of_the_board_is_a_gauge() -> None:
    figures = board_figures(read_board_state())
    page = read(metrics())
    for name, places in figures.items():
        found = {labels for told, labels in page if told == f"qvla_board_{name}"}
        assert len(found) == len(places) > 0
    assert page["qvla_board_cores", ()] == figures["cores"][()]


def test_records_and_maps_of_a_board_are_told_apart() -> None:
    class Telling(BoardState):
        def to_json(self) -> dict[str, Any]:
            return {
                "temperatures_c": {"cpu": 50.5, "gpu": 48},
                "rails": [{"name": "VDD_IN", "mw": 4200}, {"name": "VDD_SOC", "mw": None}],
                "throttled": True,
                "model": "a board",
            }

    known = read_board_state().to_json()
    assert board_figures(Telling(**known)) == {
        "temperatures_c": {("cpu",): 50.5, ("gpu",): 48.0},
        "rails": {("VDD_IN", "mw"): 4200.0},
        "throttled": {(): 1.0},
    }


def test_the_board_is_sampled_beside_the_requests() -> None:
    read_in, again = [], threading.Event()

    def reading() -> BoardState:
        read_in.append(threading.current_thread().name)
        if len(read_in) > 2:
            again.set()
        return read_board_state()

    with BoardWatch(0.001, reading) as watch:
        assert again.wait(20)
        assert watch.state.cores > 0
    taken = len(read_in)
    assert {*read_in[1:]} == {"qvla-board"}
    assert watch.state and len(read_in) == taken


def test_an_observer_that_fails_is_dismissed_and_costs_no_action(
    caplog: pytest.LogCaptureFixture,
) -> None:
    told: list[ServedRequest] = []

    class Good:
        def on_request(self, served: ServedRequest) -> None:
            told.append(served)

    class Bad:
        def on_request(self, served: ServedRequest) -> None:
            raise OSError("the disk is full")

    observers = Observers((Bad(), Good()))
    for _ in range(3):
        observers.on_request(acted(total=1.0))
    assert len(told) == 3
    assert [record.message for record in caplog.records] == [
        "Bad failed and is told no more: OSError: the disk is full"
    ]


def test_a_server_counts_what_it_serves_and_not_its_warm_up() -> None:
    settings = ServerSettings(port=0, warmup=3, token=TOKEN)
    headers = {"authorization": f"Bearer {TOKEN}"}
    with open_server(EchoPolicy(OFT), settings) as url:
        assert requests.get(url + "/metrics", timeout=20).status_code == 401
        for _ in range(5):
            post(url, oft_fields(), headers=headers)
        post(url, oft_fields(instruction="fail"), headers=headers)
        post(url, oft_fields(state=None), headers=headers)
        reply = requests.get(url + "/metrics", headers=headers, timeout=20)
        accept = {"accept": "application/openmetrics-text; version=1.0.0"}
        modern = requests.get(url + "/metrics", headers={**headers, **accept}, timeout=20)
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert modern.text.endswith("# EOF\n")
    page = samples(reply.text)
    assert page["qvla_actions_total", ()] == 5
    for stage in ("decode", "preprocess", "engine", "encode", "total"):
        assert page["qvla_stage_seconds_count", (("stage", stage),)] == 5
    for kind in ("PolicyFailure", "InvalidObservation", "Unauthorized"):
        assert page["qvla_errors_total", (("kind", kind),)] == 1
    assert page["qvla_drops_total", (("what", "request"),)] == 1
    assert page["process_resident_memory_bytes", ()] > 1e6
