"""Places and bytes that run out: who is idle or slow makes room, and nobody else."""

import random
import socket
from contextlib import ExitStack

import pytest
import requests
from echo_policy import OFT, EchoPolicy, oft_fields, post
from rude_clients import acts, place_of, websocket_client

import jetson.server
import jetson.serving.connections as connections
from jetson.errors import ServerBusy
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.byte_budget import ByteBudget
from jetson.serving.connections import Connection, Connections


@pytest.fixture
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Idle clients make room at once; the wait itself is not what is tested."""
    monkeypatch.setattr(connections, "IDLE_S", 0.0)


@pytest.mark.usefixtures("no_grace")
def test_idle_websockets_make_room_for_those_that_ask() -> None:
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        for _ in range(33):
            websocket_client(url, stack)
        good = websocket_client(url, stack)
        assert all(acts(good) for _ in range(3))


@pytest.mark.usefixtures("no_grace")
def test_idle_connections_make_room_for_those_that_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jetson.server, "connection_limit", lambda: 8)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        for _ in range(20):
            stack.enter_context(socket.create_connection(place_of(url)))
        for _ in range(5):
            assert post(url, oft_fields()).status_code == 200


def test_a_full_server_says_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "IDLE_S", 60.0)
    monkeypatch.setattr(jetson.server, "connection_limit", lambda: 2)
    with ExitStack() as stack:
        url = stack.enter_context(open_server(EchoPolicy(OFT), ServerSettings(port=0)))
        for _ in range(2):
            stack.enter_context(socket.create_connection(place_of(url)))
        while True:  # until the server has taken both
            try:
                refused = requests.get(url + "/healthz", timeout=20)
            except requests.ConnectionError:
                continue
            if refused.status_code == 503:
                break
        assert refused.headers["retry-after"] == "1" and "the limit is 2" in refused.json()["error"]


def test_the_slowest_message_makes_room() -> None:
    budget, evicted = ByteBudget(100), []
    slow, slower = (budget.hold(lambda n=n: evicted.append(n)) for n in ("slow", "slower"))
    slow.add(60)
    slower.add(30)
    with budget.hold(lambda: None) as quick:
        quick.add(50)
        assert evicted == ["slow"] and slow.evicted and budget.held_bytes == 80
        quick.complete()
        slower.add(15)
        with pytest.raises(ServerBusy, match="faster"):
            slower.add(15)
    assert budget.held_bytes == 0
    with budget.hold(lambda: None) as large, pytest.raises(ServerBusy):
        large.add(101)
    assert budget.held_bytes == 0


def test_whoever_is_quick_is_never_refused_and_the_bytes_are_bounded() -> None:
    rng, budget = random.Random(7), ByteBudget(1000)
    trickling = []
    for _ in range(3000):
        if rng.random() < 0.5:
            trickling.append(budget.hold(lambda: None))
        for held in rng.sample(trickling, min(3, len(trickling))):
            try:
                held.add(rng.randrange(60))
            except ServerBusy:
                trickling.remove(held)
        with budget.hold(lambda: None) as quick:
            quick.add(300)
            quick.complete()
        assert 0 <= budget.held_bytes <= 1000


def test_one_address_cannot_take_all_places() -> None:
    ended: list[str] = []
    group = Connections(10, 3, "clients")

    def connection(peer: str, busy: bool = True) -> Connection:
        return Connection(peer, lambda: ended.append(peer), busy, idle_since_s=-1e9)

    for _ in range(3):
        group.admit(connection("10.0.0.1"))
    with pytest.raises(ServerBusy, match="one address"):
        group.admit(connection("10.0.0.1"))
    for _ in range(7):
        group.admit(connection("127.0.0.1"))
    with pytest.raises(ServerBusy, match="the limit is 10"):
        group.admit(connection("10.0.0.2"))
    assert not ended
