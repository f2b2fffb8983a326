"""From camera frames to `pixel_values` of policies with pictures of any size, one a camera.

Torch-free: the robot runs this file. Sources: lerobot 0.6.1 `policies/act` (no resize),
`policies/smolvla` and `policies/pi0` (`resize_with_pad`); openpi-client `image_tools.py`.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvla_export.shared.errors import InvalidObservation

# "none": frames have the size, or are refused. "pad-left-top": as large as fits, in the lower right
# corner; what is left is black. "pad-center": in the middle. "pad-center-antialias": the same by
# Pillow, whose bilinear filter widens where it shrinks.
Resize = Literal["none", "pad-left-top", "pad-center", "pad-center-antialias"]
RESIZES = get_args(Resize)
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
    antialias = spec.resize == "pad-center-antialias"
    if not fits and antialias:
        rows, columns = _fitting(height, width, spec)
        resized = Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR)
        image = np.asarray(resized)
    levels = np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32)
    levels /= np.float32(255)
    if not fits:
        levels = levels if antialias else _bilinear(levels, *_fitting(height, width, spec))
        levels = _padded(levels, spec)
    mean, std = (np.asarray(v[camera], np.float32)[:, None, None] for v in (spec.means, spec.stds))
    np.subtract(levels, mean, out=out)
    out /= std


def _fitting(height: int, width: int, spec: FrameSpec) -> tuple[int, int]:
    """Return the rows and columns of a frame that fills one axis and fits into the other."""
    ratio = max(width / spec.width, height / spec.height)
    return int(height / ratio), int(width / ratio)


def _padded(levels: NDArray[np.float32], spec: FrameSpec) -> NDArray[np.float32]:
    """Put [C, h, w] into black of the policy's size, where `resize` says."""
    rows, columns = levels.shape[1:]
    top, left = spec.height - rows, spec.width - columns
    if spec.resize != "pad-left-top":  # what is odd is below and on the right
        top, left = top // 2, left // 2
    padded = np.zeros((levels.shape[0], spec.height, spec.width), np.float32)
    padded[:, top : top + rows, left : left + columns] = levels
    return padded


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
