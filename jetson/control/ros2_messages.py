"""Between ROS 2 messages and this project's nouns; needs no ROS.

Messages are taken and filled by their fields (`sensor_msgs/Image`, `CompressedImage`,
`JointState`, `std_msgs/Float32MultiArray`, `trajectory_msgs/JointTrajectory`), so that whatever
has those fields will do: `jetson.control.ros2` brings the real ones.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from jetson.control.sources import TimedObservation
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.observation import Observation
from qvla_export.shared.pictures.picture_bounds import picture_fault

# Encoding -> bytes a channel and where red, green and blue are in a pixel
# (sensor_msgs/image_encodings.hpp).
_ENCODINGS: Mapping[str, tuple[int, int, tuple[int, int, int]]] = MappingProxyType(
    {
        "rgb8": (1, 3, (0, 1, 2)),
        "bgr8": (1, 3, (2, 1, 0)),
        "rgba8": (1, 4, (0, 1, 2)),
        "bgra8": (1, 4, (2, 1, 0)),
        "8UC3": (1, 3, (2, 1, 0)),
        "mono8": (1, 1, (0, 0, 0)),
        "8UC1": (1, 1, (0, 0, 0)),
        "rgb16": (2, 3, (0, 1, 2)),
        "bgr16": (2, 3, (2, 1, 0)),
        "mono16": (2, 1, (0, 0, 0)),
    }
)


def image_of(message: Any) -> NDArray[np.uint8]:
    """Return the picture of a `sensor_msgs/Image`: RGB uint8 [h, w, 3], 16 bits cut to 8.

    8UC3 is taken for BGR, as cv_bridge does; a Bayer pattern or depth is refused.

    Raises:
        InvalidObservation: the encoding is unknown, or the size does not fit the data.
    """
    if message.encoding not in _ENCODINGS:
        raise InvalidObservation(
            f"image encoding must be one of {sorted(_ENCODINGS)}, got {message.encoding!r:.40}; "
            "convert it in the camera driver or with image_proc"
        )
    width_bytes, channels, order = _ENCODINGS[message.encoding]
    row_bytes = message.width * channels * width_bytes
    data = np.frombuffer(memoryview(message.data), np.uint8)
    fits = message.step >= row_bytes > 0 and data.size == message.height * message.step
    if not fits or message.height < 1:
        raise InvalidObservation(
            f"a {message.width}x{message.height} image in {message.encoding} with rows of "
            f"{message.step} bytes needs {message.height * message.step} bytes and rows of at "
            f"least {row_bytes}, got {data.size}"
        )
    # Rows may end in padding.
    rows = data.reshape(message.height, message.step)[:, :row_bytes]
    pixels = rows.reshape(message.height, message.width, channels, width_bytes)
    # The high byte alone: 16 bits become 8.
    high = 0 if message.is_bigendian else width_bytes - 1
    return np.ascontiguousarray(pixels[:, :, order, high])


def compressed_image_of(message: Any) -> NDArray[np.uint8]:
    """Return the picture of a `sensor_msgs/CompressedImage`: RGB uint8 [h, w, 3].

    Raises:
        InvalidObservation: the bytes are neither JPEG nor PNG, or the picture is enormous.
    """
    try:
        with Image.open(io.BytesIO(bytes(message.data)), formats=("JPEG", "PNG")) as picture:
            if fault := picture_fault(picture.width, picture.height):
                raise InvalidObservation(fault)
            return np.asarray(picture.convert("RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidObservation(
            f"a compressed image must be JPEG or PNG, got {message.format!r:.40}: {error}"
        ) from None


def state_of(message: Any, joints: Sequence[str]) -> NDArray[np.float32]:
    """Return the positions of a `sensor_msgs/JointState` in the order of `joints`. float32 [n]

    Raises:
        InvalidObservation: a joint is missing, or has no position.
    """
    positions = dict(zip(message.name, message.position, strict=False))
    missing = [name for name in joints if name not in positions]
    if missing:
        raise InvalidObservation(
            f"joint states must have positions of {list(joints)}, missing {missing}, "
            f"got names {list(message.name)} and {len(message.position)} positions"
        )
    return np.array([positions[name] for name in joints], np.float32)


def seconds_of(stamp: Any) -> float:
    """Return a `builtin_interfaces/Time` in seconds."""
    return float(stamp.sec) + float(stamp.nanosec) * 1e-9


def observed_at(stamp: Any, ros_now_s: float, now_s: float) -> float:
    """Return when a message's content was taken, on the loop's monotonic clock.

    ROS stamps are on another clock, which may be set; only the age is carried over. A driver that
    leaves the stamp at 0 is believed to be prompt; a stamp of the future is taken for now.
    """
    stamped_s = seconds_of(stamp)
    return now_s if stamped_s == 0.0 else now_s - max(0.0, ros_now_s - stamped_s)


def fill_multi_array(message: Any, dimension: Any, action: NDArray[np.float32]) -> Any:
    """Fill a `std_msgs/Float32MultiArray` and its one `MultiArrayDimension` with a command."""
    dimension.label, dimension.size, dimension.stride = "action", action.size, action.size
    message.layout.dim = [dimension]
    message.layout.data_offset = 0
    message.data = action.tolist()
    return message


def fill_trajectory(
    message: Any, point: Any, joints: Sequence[str], action: NDArray[np.float32], period_s: float
) -> Any:
    """Fill a `trajectory_msgs/JointTrajectory` and its one point, to be reached in one period.

    The header's stamp stays 0: the controller starts at once.

    Raises:
        InvalidObservation: there is not one value a joint.
    """
    if len(joints) != action.size:
        raise InvalidObservation(
            f"a trajectory needs one value a joint, got {action.size} for {list(joints)}"
        )
    message.joint_names = list(joints)
    point.positions = [float(value) for value in action]
    nanoseconds = round(period_s * 1e9)
    point.time_from_start.sec = nanoseconds // 1_000_000_000
    point.time_from_start.nanosec = nanoseconds % 1_000_000_000
    message.points = [point]
    return message


@dataclass
class ObservationParts:
    """What topics have brought so far; whole once every camera and, if needed, the state came."""

    # Image names of the policy, primary camera first.
    cameras: tuple[str, ...]
    # Joints of the state, in the policy's order; empty where it takes none.
    joints: tuple[str, ...]
    instruction: str

    def __post_init__(self) -> None:
        self._images: dict[str, tuple[NDArray[np.uint8], float]] = {}
        self._state: tuple[NDArray[np.float32], float] | None = None

    def add_image(self, camera: str, image: NDArray[np.uint8], observed_s: float) -> None:
        """Replace a camera's picture."""
        self._images[camera] = image, observed_s

    def add_state(self, state: NDArray[np.float32], observed_s: float) -> None:
        """Replace the state."""
        self._state = state, observed_s

    def whole(self) -> TimedObservation | None:
        """Return everything together, as old as its oldest part; None while a part is missing."""
        if any(name not in self._images for name in self.cameras) or not self.instruction.strip():
            return None
        images = {name: self._images[name][0] for name in self.cameras}
        observed_s = min(self._images[name][1] for name in self.cameras)
        if not self.joints:
            return TimedObservation(Observation(images, self.instruction), observed_s)
        if self._state is None:
            return None
        state, state_s = self._state
        observation = Observation(images, self.instruction, state)
        return TimedObservation(observation, min(observed_s, state_s))
