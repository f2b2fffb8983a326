"""What the clients of published robots really send, each to a policy that fits it.

The messages are those of openpi's `examples/{aloha_sim,aloha_real,droid,libero}`, sent by the
published openpi-client; of GR00T's `eval_so100.py` (N1.6, N1.7) and `eval_lerobot.py` (N1.5), whose
client is not on an index; and of OpenVLA's and OpenVLA-OFT's, sent by json-numpy and requests.
"""

import json
import logging
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import numpy as np
import pytest
import requests
from act_cases import write_tiny_act
from echo_policy import post
from gr00t_client import Gr00tClient, npy
from numpy.typing import NDArray
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from openvla_cases import write_tiny_openvla
from pi_cases import SLOTS, write_tiny_pi
from ports import free_port
from tiny_policy import TINY_CONFIG, write_tiny_checkpoint

from jetson.clients.endpoint import Endpoint
from jetson.clients.protocol_clients import open_client
from jetson.errors import RefusedSetting, WireError
from jetson.repeated_warning import RepeatedWarning
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving import http_protocol
from jetson.serving.field_names import FieldNames
from jetson.serving.policy_contract import PolicyContract, contract_of
from qvla_export.policies.families import load_policy
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

pytestmark = pytest.mark.filterwarnings(
    r"ignore:connect\(\) must be used as a context manager:DeprecationWarning"
)
TASK = "push the button"
_PIXELS = np.random.default_rng(7).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)
HIGH, LEFT, RIGHT, LOW = _PIXELS


class Acting(Protocol):
    """A policy of a checkpoint."""

    def infer(self, observation: Observation) -> ActionChunk: ...


@contextmanager
def served(
    policy: Acting, gr00t_port: int | None = None, instruction: str | None = None, **names: Any
) -> Iterator[str]:
    """Serve as `qvla serve` does with these options."""
    fields = FieldNames.parse(
        names.get("camera_alias"), names.get("state_fields"), names.get("action_fields")
    )
    settings = ServerSettings(
        port=0, gr00t_port=gr00t_port, field_names=fields, instruction=instruction, warmup=1
    )
    with open_server(policy, settings) as url:
        yield url


def ask_openpi(url: str, observation: Mapping[str, Any]) -> NDArray[np.float32]:
    client = WebsocketClientPolicy(url.replace("http", "ws", 1))
    try:
        assert isinstance(client.get_server_metadata(), dict)
        actions: NDArray[np.float32] = client.infer(dict(observation))["actions"]
        return actions
    finally:
        client._ws.close()


def aloha(*cameras: str) -> dict[str, Any]:
    """What `aloha_real/env.py` and `aloha_sim/env.py` send: no prompt, channels first."""
    images = dict(
        zip(("cam_high", "cam_left_wrist", "cam_right_wrist", "cam_low"), _PIXELS, strict=True)
    )
    return {
        "state": np.linspace(-1, 1, 14),
        "images": {name: images[name].transpose(2, 0, 1) for name in cameras},
    }


def aloha_pi(path: Any) -> Acting:
    return load_policy(
        write_tiny_pi(path, cameras=SLOTS, optional_cameras=SLOTS[1:], action_dim=14, state_dim=14)
    )


@pytest.fixture(scope="module")
def pi_of_aloha(tmp_path_factory: pytest.TempPathFactory) -> Acting:
    return aloha_pi(tmp_path_factory.mktemp("aloha") / "pi")


STATE = np.linspace(-1, 1, 14).astype(np.float32)


@pytest.mark.parametrize(
    ("cameras", "seen"),
    [
        (("cam_high",), {SLOTS[0]: HIGH}),
        (
            ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist"),
            {SLOTS[0]: HIGH, SLOTS[1]: LEFT, SLOTS[2]: RIGHT},
        ),
        (("cam_right_wrist", "cam_high"), {SLOTS[0]: HIGH, SLOTS[2]: RIGHT}),
    ],
    ids=["aloha_sim", "aloha_real", "one wrist"],
)
def test_openpi_s_aloha_clients_reach_pi0(
    pi_of_aloha: Acting, cameras: tuple[str, ...], seen: dict[str, Any]
) -> None:
    with served(pi_of_aloha, instruction=TASK, camera_alias=["full_image=cam_high"]) as url:
        got = ask_openpi(url, aloha(*cameras))
    expected = pi_of_aloha.infer(Observation(seen, TASK, STATE)).actions
    assert got.shape == (4, 14)
    np.testing.assert_array_equal(got, expected)


def test_openpi_s_aloha_client_reaches_act_which_does_not_read(tmp_path: Any) -> None:
    policy = load_policy(write_tiny_act(tmp_path / "act", state=14, action=14))
    images = {"cam_high": HIGH[:16, :24], "cam_left_wrist": LEFT[:16, :24]}
    message = aloha("cam_high") | {"images": {n: i.transpose(2, 0, 1) for n, i in images.items()}}
    with served(policy, camera_alias=["full_image=cam_high"]) as url:
        got = ask_openpi(url, message)
        np.testing.assert_array_equal(got, ask_openpi(url, {**message, "prompt": "anything"}))
    seen = {"top": images["cam_high"], "wrist": images["cam_left_wrist"]}
    np.testing.assert_array_equal(got, policy.infer(Observation(seen, "", STATE)).actions)


def test_openpi_s_runtime_executes_the_chunk(pi_of_aloha: Acting) -> None:
    """The loop of `aloha_sim/main.py`, with openpi's own runtime around the client."""
    pytest.importorskip("tree", reason="openpi-client's chunks need dm-tree")
    from openpi_client import action_chunk_broker
    from openpi_client.runtime import environment, runtime
    from openpi_client.runtime.agents import policy_agent

    executed: list[NDArray[np.float32]] = []

    class Robot(environment.Environment):  # type: ignore[misc]  # openpi_client has no types
        def reset(self) -> None:
            """Do nothing: it is called before and after."""

        def is_episode_complete(self) -> bool:
            return len(executed) == 6

        def get_observation(self) -> dict[str, Any]:
            return aloha("cam_high")

        def apply_action(self, action: dict[str, Any]) -> None:
            executed.append(action["actions"])

    with served(pi_of_aloha, instruction=TASK, camera_alias=["full_image=cam_high"]) as url:
        client = WebsocketClientPolicy(url.replace("http", "ws", 1))
        broker = action_chunk_broker.ActionChunkBroker(client, action_horizon=4)
        runtime.Runtime(
            Robot(), policy_agent.PolicyAgent(broker), subscribers=[], max_hz=0, num_episodes=1
        ).run()
        client._ws.close()
    chunk = pi_of_aloha.infer(Observation({SLOTS[0]: HIGH}, TASK, STATE)).actions
    np.testing.assert_array_equal(executed, [*chunk, *chunk[:2]])


def test_who_does_not_say_what_to_do_is_told_how(pi_of_aloha: Acting) -> None:
    with (
        served(pi_of_aloha, camera_alias=["full_image=cam_high"]) as url,
        pytest.raises(RuntimeError, match="qvla serve --instruction"),
    ):
        ask_openpi(url, aloha("cam_high"))
    with pytest.raises(RefusedSetting, match="in words"), served(pi_of_aloha, instruction=" "):
        pass


@pytest.fixture(scope="module")
def pi05(tmp_path_factory: pytest.TempPathFactory) -> Acting:
    """Of eight numbers in and out, with openpi's third picture masked."""
    path = tmp_path_factory.mktemp("pi05") / "pi"
    return load_policy(
        write_tiny_pi(
            path,
            adaptive=True,
            cameras=SLOTS,
            optional_cameras=SLOTS[2:],
            action_dim=8,
            horizon=10,
        )
    )


def test_openpi_s_droid_client_reaches_pi05(pi05: Acting) -> None:
    joints, gripper = np.linspace(-1, 1, 7), np.array([0.25])
    message = {
        "observation/exterior_image_1_left": HIGH,
        "observation/wrist_image_left": LEFT,
        "observation/joint_position": joints,
        "observation/gripper_position": gripper,
        "prompt": TASK,
    }
    names = {
        "camera_alias": ["full_image=exterior_image_1_left"],
        "state_fields": "joint_position,gripper_position",
    }
    with served(pi05, **names) as url:
        got = ask_openpi(url, message)
    # examples/droid/main.py asserts this shape.
    assert got.shape == (10, 8)
    state = np.concatenate([joints, gripper]).astype(np.float32)
    expected = pi05.infer(Observation({SLOTS[0]: HIGH, SLOTS[1]: LEFT}, TASK, state)).actions
    np.testing.assert_array_equal(got, expected)


def test_openpi_s_libero_client_reaches_pi05_without_names(pi05: Acting) -> None:
    state = np.linspace(-1, 1, 8)
    message = {
        "observation/image": HIGH,
        "observation/wrist_image": LEFT,
        "observation/state": state,
        "prompt": TASK,
    }
    with served(pi05) as url:
        got = ask_openpi(url, message)
        with pytest.raises(RuntimeError, match=r"missing .*left_wrist_0_rgb"):
            ask_openpi(url, {n: v for n, v in message.items() if "wrist" not in n})
    seen = {SLOTS[0]: HIGH, SLOTS[1]: LEFT}
    expected = pi05.infer(Observation(seen, TASK, state.astype(np.float32))).actions
    np.testing.assert_array_equal(got, expected)


@pytest.fixture(scope="module")
def so100(tmp_path_factory: pytest.TempPathFactory) -> Acting:
    path = tmp_path_factory.mktemp("so100") / "pi"
    return load_policy(
        write_tiny_pi(path, cameras=("front", "wrist"), action_dim=6, state_dim=6, horizon=16)
    )


def test_gr00t_s_clients_are_told_actions_by_their_names(so100: Acting) -> None:
    port = free_port()
    arm, gripper = np.linspace(-1, 1, 5), np.array([0.5])
    video = {"front": HIGH, "wrist": LEFT}
    state = {"single_arm": arm, "gripper": gripper}
    task = "annotation.human.task_description"
    joined = np.concatenate([arm, gripper]).astype(np.float32)
    expected = so100.infer(Observation(video, TASK, joined)).actions
    names = {"state_fields": "single_arm,gripper", "action_fields": "single_arm=5,gripper=1"}
    with served(so100, port, **names), Gr00tClient(port) as client:
        # eval_so100.py of N1.6 and N1.7: float32 in maps, batch and time in front.
        nested = {
            "video": {name: npy(image[None, None]) for name, image in video.items()},
            "state": {n: npy(v.astype(np.float32)[None, None]) for n, v in state.items()},
            "language": {task: [[TASK]]},
        }
        action, info = client.get_action(nested)
        assert {name: piece.shape for name, piece in action.items()} == {
            "single_arm": (1, 16, 5),
            "gripper": (1, 16, 1),
        }
        steps = [np.concatenate([action[n][0][t] for n in state]) for t in range(16)]
        np.testing.assert_array_equal(steps, expected)
        assert info["timing_ms"]["infer"] > 0
        # eval_lerobot.py of N1.5: float64, flat, time in front.
        flat = {f"video.{name}": npy(image[None]) for name, image in video.items()}
        flat |= {f"state.{name}": npy(value[None]) for name, value in state.items()}
        action = client.call("get_action", {**flat, task: [TASK]})
        assert list(action) == ["action.single_arm", "action.gripper"]
        steps = [
            np.concatenate([np.atleast_1d(action[f"action.{n}"][t]) for n in state])
            for t in range(16)
        ]
        np.testing.assert_array_equal(steps, expected)
        config = client.call("get_modality_config")
        assert config["action"]["as_json"]["modality_keys"] == ["single_arm", "gripper"]
        assert config["video"]["as_json"]["modality_keys"] == ["front", "wrist"]


def test_this_project_s_gr00t_client_joins_the_pieces(so100: Acting) -> None:
    port = free_port()
    seen = Observation({"front": HIGH, "wrist": LEFT}, TASK, np.zeros(6, np.float32))
    with served(so100, port, action_fields="action.single_arm=5,gripper=1"):
        client = open_client("gr00t", Endpoint.parse(f"127.0.0.1:{port}"), None, 30.0)
        np.testing.assert_array_equal(client.ask(seen), so100.infer(seen).actions)
        client.close()


def test_gr00t_s_client_need_not_say_what_the_server_knows(so100: Acting) -> None:
    port = free_port()
    nested = {
        "video": {"front": npy(HIGH[None, None]), "wrist": npy(LEFT[None, None])},
        "state": {"state": npy(np.zeros((1, 1, 6), np.float32))},
        "language": {},
    }
    with served(so100, port, instruction=TASK), Gr00tClient(port) as client:
        action, _ = client.get_action(nested)
    seen = Observation({"front": HIGH, "wrist": LEFT}, TASK, np.zeros(6, np.float32))
    np.testing.assert_array_equal(action["actions"][0], so100.infer(seen).actions)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ("single_arm=5", "5 numbers in all, an action of this policy has 6"),
        ("single_arm", "NAME=SIZE"),
        ("single_arm=5,gripper=0", "NAME=SIZE"),
        ("single_arm=5,gripper=x", "NAME=SIZE"),
        ("action.=5,gripper=1", "NAME=SIZE"),
        ("gripper=5,gripper=1", "more than once"),
        ("", "NAME=SIZE"),
    ],
)
def test_pieces_of_an_action_that_cannot_be_are_refused(
    so100: Acting, fields: str, rule: str
) -> None:
    with pytest.raises(RefusedSetting, match=rule), served(so100, action_fields=fields):
        pass


def test_openvla_s_client_reaches_openvla(tmp_path: Any) -> None:
    json_numpy = pytest.importorskip("json_numpy")
    policy = load_policy(write_tiny_openvla(tmp_path / "openvla"))
    image = HIGH[:28, :28]
    expected = policy.infer(Observation({"full_image": image}, TASK)).actions[0]
    fields = {"image": image, "instruction": TASK, "unnorm_key": "tiny"}
    with served(policy) as url:
        action = json_numpy.loads(post(url, fields).content)
        # The form of clients that cannot patch json: text in text, both ways.
        text = post(url, {"encoded": json_numpy.dumps(fields)}).json()
    np.testing.assert_array_equal(action, expected)
    np.testing.assert_array_equal(json_numpy.loads(text), expected)
    assert action.dtype == np.float64 and action.shape == (7,)


def test_openvla_oft_s_client_reaches_oft(tmp_path: Any) -> None:
    json_numpy = pytest.importorskip("json_numpy")
    policy = load_policy(write_tiny_checkpoint(tmp_path / "oft", config=TINY_CONFIG))
    image, state = HIGH[:28, :28], np.linspace(-1, 1, 4)
    fields = {"full_image": image, "state": state, "instruction": TASK}
    with served(policy) as url:
        actions = json_numpy.loads(post(url, fields).content)
    seen = Observation({"image": image}, TASK, state.astype(np.float32))
    assert isinstance(actions, list) and actions[0].shape == (4,)
    np.testing.assert_array_equal(actions, policy.infer(seen).actions)


def test_lerobot_s_grpc_is_turned_away_with_the_reason(
    so100: Acting, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gRPC channel begins with HTTP/2's preface and waits for settings."""
    fresh = RepeatedWarning(logging.getLogger(http_protocol.__name__))
    monkeypatch.setattr(http_protocol, "_GRPC", fresh)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9)
    with served(so100) as url, caplog.at_level(logging.WARNING):
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as channel:
                channel.settimeout(20)
                channel.sendall(preface)
                with suppress(ConnectionResetError):
                    assert channel.recv(1) == b""
        assert requests.get(url + "/healthz", timeout=20).status_code == 200
    (said,) = [record.message for record in caplog.records if "gRPC" in record.message]
    assert "pickles" in said and "RemotePolicy" in said


@pytest.mark.parametrize("size", [None, 224, [16], [16, "a"], [16, 0], [9000, 9000], [True, 2]])
def test_a_frame_size_that_is_none_is_refused(so100: Acting, size: Any) -> None:
    stated = contract_of(so100).to_json()
    known = PolicyContract.from_json(json.loads(json.dumps(stated)))
    assert known.frame_size == (28, 28) and known.optional_cameras == ()
    with pytest.raises(WireError, match="frame_size"):
        PolicyContract.from_json({**json.loads(json.dumps(stated)), "frame_size": size})
