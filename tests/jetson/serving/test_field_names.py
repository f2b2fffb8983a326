"""Clients with names of their own, over real sockets: openpi's ALOHA, DROID and LIBERO, GR00T's."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from echo_policy import IMAGE, EchoPolicy, post
from gr00t_client import Gr00tClient, npy
from openpi_client.websocket_client_policy import WebsocketClientPolicy
from ports import free_port

from jetson.clients.http_client import RemotePolicy
from jetson.errors import RefusedSetting
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.field_names import FieldNames
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.observation import Observation

pytestmark = pytest.mark.filterwarnings(
    r"ignore:connect\(\) must be used as a context manager:DeprecationWarning"
)
LIBERO = PolicyContract(("full_image", "wrist_image"), 4, 7, 8, "libero")
ALOHA = PolicyContract(("full_image", "left_wrist_image", "right_wrist_image"), 4, 14, 14, "aloha")
DROID_NAMES = FieldNames.parse(
    ["full_image=observation/exterior_image_1_left"], "joint_position,gripper_position"
)
ALOHA_NAMES = FieldNames.parse(["full_image=cam_high"], None)
JOINTS = np.arange(7, dtype=np.float32)
GRIPPER = np.array([0.5], np.float32)


class Seeing(EchoPolicy):
    """Keeps what it saw."""

    seen: Observation

    def infer(self, observation: Observation) -> ActionChunk:
        self.seen = observation
        return super().infer(observation)

    def pixels(self) -> list[int]:
        return [int(self.seen.images[camera][0, 0, 0]) for camera in self.contract.cameras]


@contextmanager
def served(contract: PolicyContract, names: FieldNames) -> Iterator[tuple[Seeing, str, int]]:
    policy, port = Seeing(contract), free_port()
    settings = ServerSettings(port=0, gr00t_port=port, field_names=names, warmup=1)
    with open_server(policy, settings) as url:
        yield policy, url, port


def ask_openpi(url: str, observation: dict[str, Any]) -> Any:
    client = WebsocketClientPolicy(url.replace("http", "ws", 1))
    try:
        return client.infer(observation)
    finally:
        client._ws.close()


@pytest.fixture(scope="module")
def droid() -> Iterator[tuple[Seeing, str, int]]:
    with served(LIBERO, DROID_NAMES) as server:
        yield server


def test_openpi_s_droid_client(droid: tuple[Seeing, str, int]) -> None:
    policy, url, _ = droid
    ask_openpi(
        url,
        {
            "observation/gripper_position": GRIPPER,
            "observation/joint_position": JOINTS,
            "observation/wrist_image_left": IMAGE + 2,
            "observation/exterior_image_1_left": IMAGE + 1,
            "prompt": "push",
        },
    )
    assert policy.pixels() == [1, 2]
    np.testing.assert_array_equal(policy.seen.state, [*JOINTS, 0.5])


def test_openpi_s_libero_client_needs_no_names(droid: tuple[Seeing, str, int]) -> None:
    policy, url, _ = droid
    state = np.linspace(0, 1, 8)
    ask_openpi(
        url,
        {
            "observation/state": state,
            "observation/image": IMAGE + 3,
            "observation/wrist_image": IMAGE + 4,
            "prompt": "push",
        },
    )
    assert policy.pixels() == [3, 4]
    np.testing.assert_array_equal(policy.seen.state, state.astype(np.float32))


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0)])
def test_openpi_s_aloha_client_in_any_order(order: tuple[int, ...]) -> None:
    cameras = ("cam_high", "cam_low", "cam_left_wrist", "cam_right_wrist")
    images = {cameras[i]: (IMAGE + i).transpose(2, 0, 1) for i in order}
    with served(ALOHA, ALOHA_NAMES) as (policy, url, _):
        ask_openpi(url, {"images": images, "state": np.arange(14.0), "prompt": "push"})
        assert policy.pixels() == [0, 2, 3]


def test_post_act_puts_the_state_together(droid: tuple[Seeing, str, int]) -> None:
    policy, url, _ = droid
    fields = {
        "gripper_position": 0.25,
        "joint_position": JOINTS.tolist(),
        "exterior_image_1_left": IMAGE + 5,
        "wrist_image_left": IMAGE + 6,
        "instruction": "push",
    }
    assert post(url, fields).status_code == 200
    assert policy.pixels() == [5, 6]
    np.testing.assert_array_equal(policy.seen.state, [*JOINTS, 0.25])
    with RemotePolicy(url) as remote:
        own = dict.fromkeys(LIBERO.cameras, IMAGE + 7)
        remote.infer(Observation(own, "push", np.zeros(8, np.float32)))
    assert policy.pixels() == [7, 7]


def test_gr00t_s_clients_of_three_versions(droid: tuple[Seeing, str, int]) -> None:
    policy, _, port = droid
    video = {"exterior_image_1_left": IMAGE + 8, "wrist_image": IMAGE + 9}
    state = {"joint_position": JOINTS, "gripper_position": GRIPPER}
    flat = {
        **{f"video.{name}": image for name, image in video.items()},
        **{f"state.{name}": value for name, value in state.items()},
    }
    task = "annotation.human.task_description"
    with Gr00tClient(port) as client:
        nested = {
            "video": {name: npy(image[None, None]) for name, image in video.items()},
            "state": {name: npy(value[None, None]) for name, value in state.items()},
            "language": {task: [["push"]]},
        }
        assert client.get_action(nested)[0]["actions"].shape == (1, 4, 7)
        seen = {name: npy(value[None, None]) for name, value in flat.items()}
        reply = client.get_action({**seen, task: ["push"]})
        assert reply[0]["action.actions"].shape == (1, 4, 7)
        for leading in ((0,), (0, 1)):
            seen = {name: npy(np.expand_dims(value, leading)) for name, value in flat.items()}
            reply = client.call("get_action", {**seen, task: ["push"]})
            assert reply["action.actions"].shape == (4, 7)
            assert policy.pixels() == [8, 9]
            np.testing.assert_array_equal(policy.seen.state, [*JOINTS, 0.5])
        keys = client.call("get_modality_config")["state"]["as_json"]["modality_keys"]
        assert keys == ["joint_position", "gripper_position"]
        seen = {name: npy(value) for name, value in flat.items()}
        assert "time of 1" in client.call("get_action", {**seen, task: ["push"]})["error"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"joint_position": None}, r"missing \['joint_position'\]"),
        ({"joint_position": JOINTS[:6]}, r"'joint_position': \[6\].* are 7"),
        ({"joint_position": JOINTS[None]}, "vectors"),
        ({"joint_position": JOINTS > 1}, "numbers"),
        ({"joint_position": [float("nan")] * 7}, "finite"),
        ({"full_image": IMAGE}, "send one of them"),
        ({"exterior_image_1_left": None}, "--camera-alias"),
        ({"gripper_position": None, "joint_position": None}, "or in pieces as"),
    ],
)
def test_what_does_not_fit_is_refused(
    droid: tuple[Seeing, str, int], changes: dict[str, Any], reason: str
) -> None:
    fields = {
        "gripper_position": GRIPPER,
        "joint_position": JOINTS,
        "exterior_image_1_left": IMAGE,
        "wrist_image": IMAGE,
        "instruction": "push",
    }
    sent = {name: value for name, value in {**fields, **changes}.items() if value is not None}
    reply = post(droid[1], sent)
    assert reply.status_code == 422
    assert re.search(reason, reply.json()["error"]), reply.json()["error"]


@pytest.mark.parametrize(
    ("aliases", "state_fields", "rule"),
    [
        (["cam_high"], None, "CAMERA=FIELD"),
        (["full_image="], None, "CAMERA=FIELD"),
        (["front=cam_high"], None, r"no camera 'front'; its cameras are \['full_image'"),
        (["full_image=a", "left_wrist_image=a"], None, "more than once"),
        (["full_image=left_wrist_image"], None, "another camera"),
        (["left_wrist_image=cam_right_wrist"], None, "another camera"),
        (None, "a,,b", "separated by commas"),
        (None, "", "separated by commas"),
        (None, "a,a", "more than once"),
    ],
)
def test_names_that_cannot_be_meant_are_refused(
    aliases: list[str] | None, state_fields: str | None, rule: str
) -> None:
    with pytest.raises(RefusedSetting, match=rule):
        ALOHA.named(FieldNames.parse(aliases, state_fields))


def test_state_fields_for_a_policy_without_a_state_are_refused() -> None:
    contract = PolicyContract(("front",), 4, 7, 0, "tiny")
    with pytest.raises(RefusedSetting, match="takes no state"):
        contract.named(FieldNames.parse(None, "joint_position"))


def test_full_image_is_the_primary_camera_whatever_it_is_called() -> None:
    contract = PolicyContract(("front", "hand"), 4, 7, 0, "tiny")
    named = contract.named(FieldNames.parse(["full_image=cam_high"], None))
    assert named.field_names.camera_aliases == (("front", "cam_high"),)
