"""The ROS 2 node and its conversions, on stand-ins for the messages: no ROS is needed."""

import io
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from control_doubles import LoopClock
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from jetson.control.ros2 import RosRobot, RosTopics, open_ros2
from jetson.control.ros2_messages import (
    compressed_image_of,
    fill_multi_array,
    fill_trajectory,
    image_of,
    observed_at,
    state_of,
)
from jetson.control.sinks import Command
from jetson.errors import RefusedSetting
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.errors import InvalidObservation

CONTRACT = PolicyContract(("front", "hand"), 8, 2, 2, "test")
JOINTS = ("shoulder", "elbow")


def stamp(seconds: float) -> SimpleNamespace:
    return SimpleNamespace(sec=int(seconds), nanosec=round(seconds % 1 * 1e9))


def message(**fields: object) -> SimpleNamespace:
    return SimpleNamespace(header=SimpleNamespace(stamp=stamp(0)), **fields)


def image_message(
    pixels: NDArray[np.generic], encoding: str, padding: int = 0, big: bool = False
) -> SimpleNamespace:
    """What a driver sends of pixels [h, w] or [h, w, channels]."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(pixels.dtype.newbyteorder(">" if big else "<"))
    rows = np.frombuffer(rows.tobytes(), np.uint8).reshape(height, -1)
    data = np.pad(rows, ((0, 0), (0, padding)), constant_values=99)
    return message(
        height=height, width=width, encoding=encoding, step=data.shape[1],
        is_bigendian=int(big), data=data.tobytes(),
    )  # fmt: skip


RED = np.zeros((2, 3, 3), np.uint8)
RED[..., 0], RED[..., 1] = 200, np.arange(3)


@pytest.mark.parametrize("padding", [0, 5])
@pytest.mark.parametrize(
    ("encoding", "pixels"),
    [
        ("rgb8", RED),
        ("bgr8", RED[..., ::-1]),
        ("8UC3", RED[..., ::-1]),
        ("rgba8", np.dstack([RED, RED[..., :1]])),
        ("bgra8", np.dstack([RED[..., ::-1], RED[..., :1]])),
        ("rgb16", RED.astype(np.uint16) * 256 + 7),
        ("bgr16", RED[..., ::-1].astype(np.uint16) * 256 + 7),
    ],
)
def test_pictures_of_every_encoding(encoding: str, pixels: NDArray, padding: int) -> None:
    assert (image_of(image_message(pixels, encoding, padding)) == RED).all()
    if pixels.dtype == np.uint16:
        assert (image_of(image_message(pixels, encoding, padding, big=True)) == RED).all()


@pytest.mark.parametrize(("encoding", "kind"), [("mono8", np.uint8), ("mono16", np.uint16)])
def test_grey_pictures_have_three_equal_channels(encoding: str, kind: type) -> None:
    grey = np.arange(6, dtype=kind).reshape(2, 3) * (256 if kind is np.uint16 else 1)
    image = image_of(image_message(grey, encoding))
    assert (image == np.arange(6).reshape(2, 3, 1)).all() and image.shape == (2, 3, 3)


@given(
    height=st.integers(0, 1 << 32),
    width=st.integers(0, 1 << 32),
    step=st.integers(0, 64),
    data=st.binary(max_size=64),
    encoding=st.sampled_from(["rgb8", "mono16", "bayer_rggb8", "32FC1", ""]),
)
def test_hostile_pictures_are_refused_or_whole(
    height: int, width: int, step: int, data: bytes, encoding: str
) -> None:
    sent = message(
        height=height, width=width, step=step, data=data, encoding=encoding, is_bigendian=0
    )
    try:
        image = image_of(sent)
    except InvalidObservation:
        return
    assert image.shape == (height, width, 3) and len(data) == height * step


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
def test_compressed_pictures(form: str) -> None:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), (200, 30, 30), np.uint8)).save(file, form)
    image = compressed_image_of(message(data=file.getvalue(), format=form))
    assert image.shape == (8, 8, 3) and abs(int(image[4, 4, 0]) - 200) < 10
    for wrong in (b"", b"GIF89a", file.getvalue()[:40]):
        with pytest.raises(InvalidObservation, match="JPEG or PNG"):
            compressed_image_of(message(data=wrong, format="jpeg"))


def test_an_enormous_compressed_picture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qvla_export.shared.pictures.picture_bounds.MOST_PIXELS", 50)
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    with pytest.raises(InvalidObservation, match="50 pixels"):
        compressed_image_of(message(data=file.getvalue(), format="png"))


def test_joints_are_put_in_the_policys_order() -> None:
    sent = message(name=["elbow", "wrist", "shoulder"], position=[1.0, 2.0, 3.0])
    assert state_of(sent, JOINTS).tolist() == [3.0, 1.0]
    with pytest.raises(InvalidObservation, match="shoulder"):
        state_of(message(name=["elbow", "shoulder"], position=[1.0]), JOINTS)


def test_only_the_age_of_a_stamp_is_carried_over() -> None:
    assert observed_at(stamp(1000.25), 1000.5, 7.0) == pytest.approx(6.75)
    assert observed_at(stamp(1001.0), 1000.5, 7.0) == 7.0, "never from the future"
    assert observed_at(stamp(0), 1000.5, 7.0) == 7.0, "no stamp"


def test_commands_become_messages() -> None:
    action = np.array([0.5, -1], np.float32)
    array = SimpleNamespace(layout=SimpleNamespace())
    filled = fill_multi_array(array, SimpleNamespace(), action)
    assert filled.data == [0.5, -1.0] and filled.layout.dim[0].size == 2
    point = SimpleNamespace(time_from_start=SimpleNamespace())
    path = fill_trajectory(SimpleNamespace(), point, JOINTS, action, 1.25)
    assert path.joint_names == list(JOINTS) and path.points[0].positions == [0.5, -1.0]
    assert (point.time_from_start.sec, point.time_from_start.nanosec) == (1, 250_000_000)
    with pytest.raises(InvalidObservation, match="one value a joint"):
        fill_trajectory(SimpleNamespace(), point, ("elbow",), action, 1.0)


class Node:
    """Remembers subscriptions and what is published."""

    def __init__(self) -> None:
        self.callbacks: dict[str, object] = {}
        self.published: dict[str, list[object]] = {}

    def create_subscription(self, kind: object, topic: str, callback: object, qos: object) -> None:
        self.callbacks[topic] = callback

    def create_publisher(self, kind: object, topic: str, qos: object) -> SimpleNamespace:
        return SimpleNamespace(publish=self.published.setdefault(topic, []).append)

    def get_clock(self) -> SimpleNamespace:
        return SimpleNamespace(now=lambda: SimpleNamespace(nanoseconds=1000 * 10**9))


def nested() -> SimpleNamespace:
    return SimpleNamespace(layout=SimpleNamespace(), time_from_start=SimpleNamespace())


KINDS = (
    *("Image", "CompressedImage", "JointState", "String", "Float32MultiArray"),
    *("MultiArrayDimension", "JointTrajectory", "JointTrajectoryPoint"),
)
MESSAGES = SimpleNamespace(newest=1, **dict.fromkeys(KINDS, nested))


def robot(**topics: object) -> tuple[RosRobot, Node]:
    node = Node()
    made = RosTopics(**{"contract": CONTRACT, "instruction": "go", "joints": JOINTS, **topics})
    return RosRobot(node, MESSAGES, made, LoopClock(50.0)), node


def test_the_node_puts_observations_together() -> None:
    source, node = robot()
    picture = image_message(RED, "rgb8")
    picture.header.stamp = stamp(999.5)
    node.callbacks["~/front/image"](picture)
    node.callbacks["~/joint_states"](message(name=list(JOINTS), position=[1.0, 2.0]))
    assert source.read() is None, "the other camera is missing"
    file = io.BytesIO()
    Image.fromarray(RED).save(file, "PNG")
    node.callbacks["~/hand/image/compressed"](message(data=file.getvalue(), format="png"))
    seen = source.read()
    assert seen is not None and seen.observed_s == pytest.approx(49.5), "as old as its oldest part"
    assert list(seen.observation.images) == ["front", "hand"]
    assert seen.observation.state.tolist() == [1.0, 2.0] and seen.observation.instruction == "go"
    node.callbacks["~/instruction"](message(data="stop there"))
    node.callbacks["~/front/image"](image_message(RED, "rgb8"))
    assert source.read().observation.instruction == "stop there"
    source.end()
    assert source.is_over


def test_a_message_that_cannot_be_read_is_one_failure() -> None:
    source, node = robot()
    node.callbacks["~/front/image"](image_message(RED, "yuv422"))
    with pytest.raises(InvalidObservation, match="yuv422"):
        source.read()
    node.callbacks["~/joint_states"](message(name=[], position=[]))
    with pytest.raises(InvalidObservation, match="joint"):
        source.read()
    assert source.read() is None


@pytest.mark.parametrize("joints", [(), JOINTS])
def test_the_node_publishes_commands_and_the_state(joints: tuple[str, ...]) -> None:
    sink, node = robot(command_joints=joints)
    sink.send(Command(3, np.array([0.5, 1], np.float32), 50.0, None, "holding", 51.0))
    (sent,) = node.published["~/trajectory" if joints else "~/command"]
    assert (sent.points[0].positions if joints else sent.data) == [0.5, 1.0]
    assert [state.data for state in node.published["~/state"]] == ["holding"]


def test_joints_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RefusedSetting, match="--joints"):
        robot(joints=("elbow",))
    with pytest.raises(RefusedSetting, match="--command-joints"):
        robot(command_joints=("elbow",))


def test_without_ros_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rclpy", None)
    with pytest.raises(RefusedSetting, match="source"):
        open_ros2(RosTopics(CONTRACT, "go", JOINTS), LoopClock())
