"""From camera frames to `pixel_values` of policies with pictures of any size, one a camera.

Torch-free: the robot runs this file. Sources: lerobot 0.6.1 `policies/act` (no resize) and
`policies/smolvla` (`resize_with_pad`).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.errors import InvalidObservation

# "none": frames have the size, or are refused. "pad-left-top": as large as fits, in the lower right
# corner; what is left is black.
Resize = Literal["none", "pad-left-top"]
Channels = tuple[float, float, float]


@dataclass(frozen=True)
class FrameSpec:
    """How one frame of each camera becomes pixel values."""

    height: int
    width: int
    resize: Resize
    # Of each camera, for each RGB channel: what is subtracted from values 0..1, and what they are
    # divided by then.
    means: tuple[Channels, ...]
    stds: tuple[Channels, ...]

    @property
    def pixels(self) -> int:
        """Return how many pixels a frame has."""
        return self.height * self.width


def frame_values(
    image: NDArray[np.uint8], spec: FrameSpec, camera: int, out: NDArray[np.float32]
) -> None:
    """Write the pixel values of one camera's frame.

    Args:
        image: uint8 [h, w, 3]
        spec: how.
        camera: its place among the policy's cameras.
        out: float32 [3, height, width]

    Raises:
        InvalidObservation: the frame has another size and is not resized.
    """
    height, width = image.shape[:2]
    fits = (height, width) == (spec.height, spec.width)
    if spec.resize == "none" and not fits:
        raise InvalidObservation(
            f"the policy was trained on pictures of {spec.height} x {spec.width} pixels (height x "
            f"width) and does not resize them, got {height} x {width}; send that size"
        )
    levels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    levels /= np.float32(255)
    if not fits:
        levels = _padded(levels, spec.height, spec.width)
    mean, std = (np.asarray(v[camera], np.float32)[:, None, None] for v in (spec.means, spec.stds))
    np.subtract(levels, mean, out=out)
    out /= std


def _padded(levels: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize to fit, bilinear without antialias, with zeros on the left and at the top."""
    ratio = max(levels.shape[2] / width, levels.shape[1] / height)
    rows, columns = int(levels.shape[1] / ratio), int(levels.shape[2] / ratio)
    resized = np.zeros((levels.shape[0], height, width), np.float32)
    resized[:, height - rows :, width - columns :] = _bilinear(levels, rows, columns)
    return resized


def _bilinear(levels: NDArray[np.float32], rows: int, columns: int) -> NDArray[np.float32]:
    """Interpolate [C, h, w] as torch does with `align_corners` false."""
    for axis, size in ((1, rows), (2, columns)):
        length = levels.shape[axis]
        place = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(length / size)
        place = np.maximum(place - np.float32(0.5), np.float32(0))
        first = np.minimum(place.astype(np.int64), length - 1)
        second = np.minimum(first + 1, length - 1)
        share = (place - first).reshape([-1 if i == axis else 1 for i in range(3)])
        low, high = levels.take(first, axis), levels.take(second, axis)
        levels = low * (1 - share) + high * share
    return levels.astype(np.float32)
