"""A thin ROS 2 node around the control loop: `qvla run BUNDLE --source ros2`, where ROS is sourced.

    in   ~/<camera>/image             sensor_msgs/Image            best effort, newest only
    in   ~/<camera>/image/compressed  sensor_msgs/CompressedImage  the same; either will do
    in   ~/joint_states               sensor_msgs/JointState       where the policy takes a state
    in   ~/instruction                std_msgs/String              what to do; replaces the first
    out  ~/command                    std_msgs/Float32MultiArray   one command a slot
    out  ~/trajectory                 trajectory_msgs/JointTrajectory  instead, where the actions
                                                                   are positions of named joints
    out  ~/state                      std_msgs/String              the loop's state, each command

The node is called `qvla`; <camera> is the policy's name of it; topics are remapped as usual.
Callbacks only decode and store; inference and the control loop run on threads of their own.
`rclpy` and the message packages are imported here and nowhere else.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jetson.control.loop_clock import LoopClock
from jetson.control.ros2_messages import (
    ObservationParts,
    compressed_image_of,
    fill_multi_array,
    fill_trajectory,
    image_of,
    observed_at,
    state_of,
)
from jetson.control.sinks import Command
from jetson.control.sources import PushedSource, TimedObservation
from jetson.errors import RefusedSetting
from jetson.serving.policy_contract import PolicyContract


@dataclass(frozen=True)
class RosTopics:
    """What of a policy's inputs and outputs is a joint.

    Raises:
        RefusedSetting: the joints do not fit the policy.
    """

    contract: PolicyContract
    # What to do until ~/instruction says otherwise; may be empty.
    instruction: str
    # Joints that are the policy's state, in its order.
    joints: tuple[str, ...] = ()
    # Joints that the actions are positions of; empty to publish plain numbers.
    command_joints: tuple[str, ...] = ()
    # Seconds within which a trajectory's point is to be reached.
    period_s: float = 0.1

    def __post_init__(self) -> None:
        if len(self.joints) != self.contract.state_dim:
            raise RefusedSetting(
                f"the policy's state has {self.contract.state_dim} numbers, name as many joints "
                f"(--joints), got {list(self.joints)}"
            )
        if self.command_joints and len(self.command_joints) != self.contract.action_dim:
            raise RefusedSetting(
                f"an action has {self.contract.action_dim} numbers, name as many joints "
                f"(--command-joints) or none, got {list(self.command_joints)}"
            )


class RosRobot:
    """Source and sink of the control loop on the topics of one node."""

    def __init__(self, node: Any, messages: Any, topics: RosTopics, clock: LoopClock) -> None:
        """Subscribe and advertise.

        Args:
            node: an `rclpy.node.Node`.
            messages: has the message classes by name, and `newest`, the cameras' QoS profile.
            topics: what they mean.
            clock: of the loop.
        """
        self._node = node
        self._messages = messages
        self._topics = topics
        self._clock = clock
        self._newest = PushedSource(clock)
        self._parts = ObservationParts(topics.contract.cameras, topics.joints, topics.instruction)
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self.on_close: Callable[[], None] = lambda: None
        for camera in topics.contract.cameras:
            self._listen(messages.Image, f"~/{camera}/image", self._on_image(camera, image_of))
            self._listen(
                messages.CompressedImage,
                f"~/{camera}/image/compressed",
                self._on_image(camera, compressed_image_of),
            )
        if topics.joints:
            self._listen(messages.JointState, "~/joint_states", self._on_joints)
        node.create_subscription(messages.String, "~/instruction", self._on_instruction, 1)
        kind, name = messages.Float32MultiArray, "~/command"
        if topics.command_joints:
            kind, name = messages.JointTrajectory, "~/trajectory"
        self._commands = node.create_publisher(kind, name, 1)
        self._states = node.create_publisher(messages.String, "~/state", 1)

    def read(self) -> TimedObservation | None:
        """Return the newest whole observation; raise, once, what was wrong with a message.

        Raises:
            InvalidObservation: a message cannot be understood.
        """
        with self._lock:
            error, self._error = self._error, None
        if error is not None:
            raise error
        return self._newest.read()

    def send(self, command: Command) -> None:
        """Publish one command and the state of the loop."""
        messages = self._messages
        if self._topics.command_joints:
            message = fill_trajectory(
                messages.JointTrajectory(),
                messages.JointTrajectoryPoint(),
                self._topics.command_joints,
                command.action,
                self._topics.period_s,
            )
        else:
            dimension = messages.MultiArrayDimension()
            message = fill_multi_array(messages.Float32MultiArray(), dimension, command.action)
        self._commands.publish(message)
        state = messages.String()
        state.data = command.state
        self._states.publish(state)

    @property
    def is_over(self) -> bool:
        """Whether `end` was called."""
        return self._newest.is_over

    def end(self) -> None:
        """Say that ROS is shutting down."""
        self._newest.end()

    def close(self) -> None:
        """Stop spinning and destroy the node."""
        self.on_close()

    def _listen(self, kind: Any, topic: str, callback: Callable[[Any], None]) -> None:
        self._node.create_subscription(kind, topic, callback, self._messages.newest)

    def _on_image(self, camera: str, decode: Callable[[Any], Any]) -> Callable[[Any], None]:
        def take(message: Any) -> None:
            image = decode(message)
            self._parts.add_image(camera, image, self._observed_s(message))

        return lambda message: self._take(take, message)

    def _on_joints(self, message: Any) -> None:
        def take(message: Any) -> None:
            state = state_of(message, self._topics.joints)
            self._parts.add_state(state, self._observed_s(message))

        self._take(take, message)

    def _on_instruction(self, message: Any) -> None:
        with self._lock:
            self._parts.instruction = str(message.data)

    def _take(self, take: Callable[[Any], None], message: Any) -> None:
        with self._lock:
            try:
                take(message)
                whole = self._parts.whole()
            except Exception as error:  # an executor ends with its callback; the loop must hear it
                self._error = error
                return
        if whole is not None:
            self._newest.push(whole.observation, whole.observed_s)

    def _observed_s(self, message: Any) -> float:
        ros_now_s = self._node.get_clock().now().nanoseconds * 1e-9
        return observed_at(message.header.stamp, ros_now_s, self._clock.now_s())


class RosMessages:
    """The real message classes.

    Raises:
        RefusedSetting: ROS 2 is not sourced.
    """

    def __init__(self) -> None:
        try:
            from rclpy.qos import qos_profile_sensor_data
            from sensor_msgs.msg import CompressedImage, Image, JointState
            from std_msgs.msg import Float32MultiArray, MultiArrayDimension, String
            from trajectory_msgs.msg import JointTrajectory, JointTrajectoryPoint
        except ImportError as error:
            raise RefusedSetting(
                f"ROS 2 is not here ({error.name}): source /opt/ros/<distribution>/setup.bash, and "
                "run with the Python that it is for"
            ) from None
        self.newest = qos_profile_sensor_data
        self.CompressedImage, self.Image, self.JointState = CompressedImage, Image, JointState
        self.Float32MultiArray, self.MultiArrayDimension = Float32MultiArray, MultiArrayDimension
        self.String = String
        self.JointTrajectory = JointTrajectory
        self.JointTrajectoryPoint = JointTrajectoryPoint


def open_ros2(topics: RosTopics, clock: LoopClock, arguments: Sequence[str] = ()) -> RosRobot:
    """Start the node `qvla` and spin it on a thread of its own.

    Args:
        topics: what they mean.
        clock: of the loop.
        arguments: ROS arguments, as after `--ros-args`.

    Raises:
        RefusedSetting: ROS 2 is not sourced.
    """
    messages = RosMessages()
    import rclpy
    from rclpy.executors import ExternalShutdownException
    from rclpy.signals import SignalHandlerOptions

    # SIGINT and SIGTERM are the loop's: it must still be able to send the safe action.
    ros_arguments = ["--ros-args", *arguments] if arguments else []
    rclpy.init(args=ros_arguments, signal_handler_options=SignalHandlerOptions.NO)
    node = rclpy.create_node("qvla")
    robot = RosRobot(node, messages, topics, clock)

    def spin() -> None:
        try:
            rclpy.spin(node)
        except ExternalShutdownException:
            pass
        finally:
            robot.end()

    thread = threading.Thread(target=spin, name="qvla-ros2", daemon=True)

    def close() -> None:
        rclpy.try_shutdown()
        thread.join(timeout=2.0)
        node.destroy_node()

    robot.on_close = close
    thread.start()
    return robot
