"""vla-eval's websocket protocol over real sockets; `test_vla_eval_harness` runs the harness."""

import contextlib
import io
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import requests
from echo_policy import IMAGE, OFT, OPENVLA, EchoPolicy, GatedPolicy
from PIL import Image
from vla_eval_client import VlaEvalClient, pack, picture, tagged
from websockets.exceptions import ConnectionClosed, InvalidStatus

from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.field_names import FieldNames
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

TOKEN = "a-token-that-is-not-guessed"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, max_body_bytes=1 << 20)) as url:
        yield url


@pytest.fixture
def client(url: str) -> Iterator[VlaEvalClient]:
    client = VlaEvalClient(url)
    yield client
    client.close()


def seen(value: int = 0, **changes: Any) -> dict[str, Any]:
    """What a benchmark sends; the policy acts on the first pixel, `value`."""
    observation = {
        "images": {"front": picture(IMAGE + value), "wrist": picture(IMAGE)},
        "task_description": "push",
        "state": tagged(np.zeros(8)),
    }
    return {k: v for k, v in {**observation, **changes}.items() if v is not None}


def test_the_server_says_what_benchmarks_should_send(client: VlaEvalClient) -> None:
    assert client.server_info["protocol_version"] == 1
    params = client.server_info["observation_params"]
    assert params == {"send_wrist_image": True, "send_state": True}
    with open_server(EchoPolicy(OPENVLA), ServerSettings(port=0)) as url:
        other = VlaEvalClient(url)
        assert other.server_info["observation_params"] == {}
        image = {"image": picture(IMAGE + 2)}
        assert other.act({"images": image, "task_description": "push"})[0] == 2
        other.close()


def test_a_chunk_is_handed_out_action_by_action(client: VlaEvalClient) -> None:
    client.send("episode_start", {"task": {"name": "push"}})
    # The horizon is 4: what is seen in between changes nothing.
    taken = np.stack([client.act(seen(value)) for value in (10, 20, 30, 40, 50, 60)])
    assert taken.dtype == np.float32 and taken.shape == (6, 7)
    np.testing.assert_array_equal(taken[:, 0], [10, 10, 10, 10, 50, 50])
    np.testing.assert_array_equal(taken[:, 1], [0, 1, 2, 3, 0, 1])
    client.send("episode_end", {"success": True})
    client.send("episode_start", {})
    assert client.act(seen(70))[:2].tolist() == [70, 0]


@pytest.mark.parametrize(("execute", "looks"), [(1, [1, 2, 3, 4]), (3, [1, 1, 1, 4]), (9, [1] * 4)])
def test_the_url_says_how_much_of_a_chunk_is_executed(
    url: str, execute: int, looks: list[int]
) -> None:
    client = VlaEvalClient(url, f"?execute={execute}")
    assert [int(client.act(seen(value))[0]) for value in (1, 2, 3, 4)] == looks
    client.close()


def test_the_gripper_is_turned_for_robosuite() -> None:
    class Grips(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            actions = super().infer(observation).actions
            actions[:, -1] = [0.0, 0.4, 0.6, 1.0]
            return ActionChunk(actions, actions)

    with open_server(Grips(OFT), ServerSettings(port=0)) as url:
        for query, expected in (("", [0.0, 0.4, 0.6, 1.0]), ("?gripper=robosuite", [1, 1, -1, -1])):
            client = VlaEvalClient(url, query)
            taken = [float(client.act(seen())[-1]) for _ in range(4)]
            np.testing.assert_allclose(taken, expected, rtol=1e-6)
            client.close()


@pytest.mark.parametrize(
    "query",
    ["?execute=-1", "?execute=x", "?steps=4", "?execute=1&execute=2", "?gripper=up", "?=;"],
)
def test_an_unknown_option_is_refused_before_the_handshake(url: str, query: str) -> None:
    with pytest.raises(InvalidStatus) as refused:
        VlaEvalClient(url, query)
    assert refused.value.response.status_code == 400
    assert b"execute=NUMBER" in (refused.value.response.body or b"")


def test_in_live_mode_every_observation_is_answered_in_order(client: VlaEvalClient) -> None:
    client.send("episode_start", {"task": {}, "mode": "live"})
    sent = [client.send("observation", seen(value)) for value in range(10)]
    replies = [client.receive() for _ in sent]
    assert [reply["seq"] for reply in replies] == sent
    looks = [int(reply["payload"]["actions"][0]) for reply in replies]
    assert looks == [0, 0, 0, 0, 4, 4, 4, 4, 8, 8]


def test_pictures_arrive_as_they_were_whatever_their_form(client: VlaEvalClient) -> None:
    flat = np.full((64, 48, 3), 90, np.uint8)
    for front in (picture(flat), picture(flat, "raw"), tagged(flat)):
        client.send("episode_start", {})
        assert client.act(seen(images={"front": front, "wrist": tagged(IMAGE)}))[0] == 90
    client.send("episode_start", {})
    lossy = picture(flat, "jpeg", quality=95)
    assert abs(client.act(seen(images={"front": lossy, "wrist": lossy}))[0] - 90) <= 2


def test_names_of_benchmarks_are_told_to_the_server() -> None:
    names = FieldNames.parse(["full_image=agentview"], "states,gripper")
    with open_server(EchoPolicy(OFT), ServerSettings(port=0, field_names=names)) as url:
        client = VlaEvalClient(url)
        images = {"agentview": picture(IMAGE + 5), "wrist": picture(IMAGE)}
        pieces = {"state": None, "states": tagged(np.zeros(7)), "gripper": 0.5}
        assert client.act(seen(images=images, **pieces))[0] == 5
        client.close()
    with open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url:
        client = VlaEvalClient(url)  # as LIBERO calls the whole state
        assert client.act(seen(6, state=None, states=tagged(np.zeros(8))))[0] == 6
        client.close()


GREY = np.zeros((16, 20), np.uint8)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"images": {}}, "missing .*front"),
        ({"images": [1]}, "map of cameras"),
        ({"images": {"front": "a picture", "wrist": picture(IMAGE)}}, "as vla-eval packs one"),
        ({"images": {"front": picture(GREY), "wrist": picture(IMAGE)}}, r"h, w, 3"),
        ({"state": tagged(np.zeros(3))}, "8 numbers"),
        ({"state": tagged(np.full(8, np.nan))}, "NaN"),
        ({"states": tagged(np.zeros(8))}, "twice"),
        ({"task_description": None}, "instruction"),
        ({"task_description": "fail"}, "PolicyFailure: .*the engine is on fire"),
        ({"task_description": "nan"}, "NaN or infinity"),
    ],
)
def test_a_failure_is_an_error_message_and_the_connection_stays(
    client: VlaEvalClient, changes: dict[str, Any], reason: str
) -> None:
    error = client.ask("observation", seen(**changes))["error"]
    assert re.search(reason, error) and "Traceback" not in error
    assert client.act(seen(3))[0] == 3


def cut(form: str) -> dict[str, Any]:
    whole = picture(np.zeros((64, 64, 3), np.uint8), form)
    return {**whole, "data": whole["data"][:-40]}


BOMB = {"__image__": True, "format": "png", "shape": [9000, 9000, 3]}


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (cut("png"), "damaged"),
        (cut("jpeg"), "damaged"),
        ({**picture(IMAGE), "data": b""}, "damaged"),
        ({**picture(IMAGE), "data": "text"}, "bytes of a"),
        ({**picture(IMAGE), "format": "gif"}, "bytes of a"),
        ({**picture(IMAGE), "format": ["png"]}, "bytes of a"),
        ({**picture(IMAGE), "format": "jpeg"}, "damaged"),
        ({**picture(IMAGE), "shape": [20, 16, 3]}, "its shape"),
        ({**picture(IMAGE), "shape": None}, "shape must be"),
        (picture(np.zeros((1, 100, 3), np.uint8)), "1 to 8"),
        ({**tagged(IMAGE), "dtype": "|O"}, "dtype must be"),
        ({**tagged(IMAGE), "data": b""}, "need 960 bytes"),
        ({**tagged(IMAGE), "shape": [1 << 31, 1 << 31]}, "shape must be"),
    ],
)
def test_a_picture_whose_parts_disagree_is_refused(
    client: VlaEvalClient, value: dict[str, Any], reason: str
) -> None:
    images = {"front": value, "wrist": picture(IMAGE)}
    error = client.ask("observation", seen(images=images))["error"]
    assert error.startswith("WireError: ") and reason in error


def test_a_picture_is_refused_by_its_size_before_it_is_decoded(client: VlaEvalClient) -> None:
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    images = {"front": {**BOMB, "data": file.getvalue()}, "wrist": picture(IMAGE)}
    assert "is no camera's" in client.ask("observation", seen(images=images))["error"]


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xc1",
        b"\x81" * 2000,
        "text",
        pack("observation", [1], 1),
        pack("observation", {}, None),
        pack("dance", {}, 1),
        pack("hello", {"protocol_version": 2}, 1),
    ],
    # A message says when it was made, which two workers would call two tests.
    ids=["nothing", "unknown byte", "deep", "text", "list", "no number", "dance", "version 2"],
)
def test_what_is_no_message_gets_a_reason_and_ends_the_connection(
    url: str, message: bytes | str
) -> None:
    client = VlaEvalClient(url)
    client.socket.send(message)
    reply = client.receive()
    assert reply["type"] == "error" and reply["payload"]["error"].startswith("WireError: ")
    with pytest.raises(ConnectionClosed):
        client.receive()
    client.close()


def test_the_rate_counts_and_the_token_is_the_url_s_password() -> None:
    settings = ServerSettings(port=0, token=TOKEN, max_rate_hz=2.0)
    with open_server(EchoPolicy(OFT), settings) as url:
        with pytest.raises(InvalidStatus) as refused:
            VlaEvalClient(url)
        assert refused.value.response.status_code == 401
        # That try, the handshake and the hello are three of the four allowed at once.
        client = VlaEvalClient(url.replace("://", f"://qvla:{TOKEN}@"))
        assert client.act(seen(1))[0] == 1
        with contextlib.suppress(ConnectionClosed):
            for _ in range(60):
                client.send("observation", seen(1))
        while "error" not in (payload := client.receive()["payload"]):
            assert payload["actions"][0] == 1
        assert "2 times a second" in payload["error"]
        with pytest.raises(ConnectionClosed):
            client.receive()
        client.close()


def test_openpi_s_clients_and_everybody_else_are_served_beside_it(url: str) -> None:
    assert requests.get(url + "/vla-eval", timeout=20).status_code == 404
    with ThreadPoolExecutor(4) as pool:

        def episode(value: int) -> list[float]:
            client = VlaEvalClient(url, "?execute=1")
            taken = [float(client.act(seen(value))[0]) for _ in range(8)]
            client.close()
            return taken

        episodes = [pool.submit(episode, value) for value in range(4)]
        assert [job.result() for job in episodes] == [[float(v)] * 8 for v in range(4)]


def test_the_action_under_way_is_sent_before_the_server_ends() -> None:
    policy = GatedPolicy()
    with ThreadPoolExecutor(1) as pool:
        with open_server(policy, ServerSettings(port=0, warmup=0)) as url:
            client = VlaEvalClient(url)
            action = pool.submit(client.act, seen(9))
            assert policy.acting.wait(20)
            threading.Timer(0.2, policy.gate.set).start()
        assert action.result(20)[0] == 9
        client.close()
