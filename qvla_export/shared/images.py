"""From a camera frame to `pixel_values`, exactly as OpenVLA's training and evaluation did.

Torch-free: the robot runs this file. Sources: openvla `processing_prismatic.py`
(PrismaticImageProcessor) and openvla-oft `experiments/robot/openvla_utils.py`.
"""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from qvla_export.shared.artifacts import read_json
from qvla_export.shared.errors import CheckpointError
from qvla_export.shared.pictures.picture_bounds import MOST_INPUT_SIDE
from qvla_export.shared.pictures.resampling import bicubic, lanczos

ResizeStrategy = Literal["resize-naive", "letterbox", "resize-crop"]
_STRATEGIES = ("resize-naive", "letterbox", "resize-crop")
_CROP_ROWS = 32
# Of a mean or a deviation of values that lie between 0 and 1.
_MOST_LEVEL = 1e6
_CROP_AREA = 0.9  # openvla evaluates on the central 90 % of the area that training cropped from


@dataclass(frozen=True)
class ImageSpec:
    """How one frame becomes the pixel values of the vision towers."""

    # Side of the square input in pixels.
    size: int
    strategy: ResizeStrategy
    # Per tower: mean and standard deviation of each RGB channel, values in 0..1.
    means: tuple[tuple[float, float, float], ...]
    stds: tuple[tuple[float, float, float], ...]
    # Value 0..255 that fills a letterbox.
    fill: tuple[int, int, int] = (0, 0, 0)

    def __post_init__(self) -> None:
        if type(self.size) is not int or not 1 <= self.size <= MOST_INPUT_SIDE:
            raise CheckpointError(
                f"pictures must be made 1 to {MOST_INPUT_SIDE} pixels wide, got {self.size!r:.40}"
            )
        if self.strategy not in _STRATEGIES:
            raise CheckpointError(
                f"resize strategy must be one of {_STRATEGIES}, got {self.strategy!r:.80}"
            )
        if not self.means or len(self.means) != len(self.stds):
            raise CheckpointError("each tower needs the mean and the deviation of its pictures")
        channels = [*self.means, *self.stds]
        if not all(are_channels(values) for values in channels) or not all(
            value > 0 for values in self.stds for value in values
        ):
            raise CheckpointError(
                f"means and deviations must be three finite numbers a tower, deviations above 0, "
                f"got {channels!r:.200}"
            )
        whole = isinstance(self.fill, tuple) and len(self.fill) == 3
        if not whole or not all(type(v) is int and 0 <= v <= 255 for v in self.fill):
            raise CheckpointError(f"a letterbox is filled with three bytes, got {self.fill!r:.80}")


def are_channels(values: object) -> bool:
    """Say whether a value is three numbers of a picture's channels: means, deviations."""
    return (
        isinstance(values, tuple)
        and len(values) == 3
        and all(type(v) in (int, float) and abs(v) <= _MOST_LEVEL for v in values)
    )


def load_image_spec(path: Path) -> ImageSpec:
    """Read `preprocessor_config.json`.

    Raises:
        CheckpointError: a field is missing or the towers want different sizes or resamplers.
    """
    raw = read_json(path, "preprocessor configuration")
    try:
        sizes = {tuple(size[1:]) for size in raw["input_sizes"]}
        strategy = raw["image_resize_strategy"]
        normalize = raw["tvf_normalize_params"]
        # The serialized tvf parameters win over `means`/`stds` in from_pretrained.
        means = tuple(tuple(float(v) for v in tower["mean"]) for tower in normalize)
        stds = tuple(tuple(float(v) for v in tower["std"]) for tower in normalize)
        interpolations = list(raw["interpolations"])
        fill = tuple(int(v * 255) for v in raw["means"][-1])
    except (KeyError, TypeError, IndexError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a PrismaticImageProcessor: {error!r}") from error
    if len(sizes) != 1 or len({*next(iter(sizes))}) != 1:
        raise CheckpointError(f"{path}: towers must share one square size, got {list(sizes)!r:.80}")
    if any(name != "bicubic" for name in interpolations):
        raise CheckpointError(
            f"{path}: pictures must be resized by bicubic interpolation, got {interpolations!r:.80}"
        )
    size = next(iter(sizes))[0]
    try:
        # Upstream computes a fill per tower but the last one overwrites the others.
        return ImageSpec(size, strategy, means, stds, fill)  # type: ignore[arg-type]  # lengths
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


def pixel_values(
    image: NDArray[np.uint8], spec: ImageSpec, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Return the stacked, normalized towers' inputs of one frame, in `out` where it is given.

    float32 [3 towers, S, S], contiguous
    """
    planes = np.ascontiguousarray(_resize(image, spec).transpose(2, 0, 1))
    # In the order in which torchvision computes, and what the towers share once.
    levels = planes.astype(np.float32)
    levels /= np.float32(255)
    shape = (len(spec.means), *planes.shape)
    values = np.empty(shape, np.float32) if out is None else out.reshape(shape)
    for tower, mean, std in zip(values, spec.means, spec.stds, strict=True):
        np.subtract(levels, np.asarray(mean, np.float32)[:, None, None], out=tower)
        tower /= np.asarray(std, np.float32)[:, None, None]
    return values.reshape(-1, *planes.shape[1:])


def resize_like_training(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """JPEG round trip and lanczos3 to [size, size, 3], as the training data went through.

    openvla-oft `resize_image_for_policy`. TensorFlow decodes with libjpeg's fast integer DCT,
    hence simplejpeg; its lanczos works in floats, which `lanczos` does.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=2)
    decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(buffer.getvalue(), "RGB", fastdct=True)
    return lanczos(decoded, size)


def center_crop(image: NDArray[np.uint8], size: int = 224) -> NDArray[np.uint8]:
    """Crop the central 90 % of the area to [size, size, 3] (`tf.image.crop_and_resize`).

    Bilinear, corner-aligned inside the box, no antialias; back to uint8 by floor(x * 255.5).
    """
    height, width = image.shape[:2]
    rows, row_weights = _crop_grid(height, size)
    columns, column_weights = _crop_grid(width, size)
    below, right = np.minimum(rows + 1, height - 1), np.minimum(columns + 1, width - 1)
    # Lines of numbers: loops over the three channels of a pixel would be most of the time.
    lines = image.reshape(height, width * 3)
    across = _Neighbours(_channels(columns), _channels(right), np.repeat(column_weights, 3))
    cropped = np.empty((size, size * 3), np.uint8)
    # A few rows at a time: memory that the allocator keeps, where larger arrays cost page faults.
    for start in range(0, size, _CROP_ROWS):
        part = slice(start, start + _CROP_ROWS)
        top = rows[start]
        # Across every row once, not for the upper and the lower neighbours apart.
        mixed = _mix(lines[top : below[part][-1] + 1], across, axis=1)
        down = _Neighbours(rows[part] - top, below[part] - top, row_weights[part, None])
        mixed = _mix(mixed, down, axis=0)
        np.clip(mixed, 0, 1, out=mixed)
        mixed *= np.float32(255.5)
        # The cast cuts off, which is floor where nothing is negative.
        cropped[part] = mixed
    return cropped.reshape(size, size, 3)


@dataclass(frozen=True)
class _Neighbours:
    """Indices of the two values that each result lies between, and the second one's weight."""

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    weights: NDArray[np.float32]


def _mix(values: NDArray[Any], neighbours: _Neighbours, axis: int) -> NDArray[np.float32]:
    """Return first + (second - first) * weights of the neighbours along an axis.

    Bytes become 0..1 after they are picked: fewer of them, and a quarter of the memory to move.
    """
    start, step = (
        # "clip" changes nothing and spares `take` its check.
        values.take(index, axis, mode="clip").astype(np.float32, copy=False)
        for index in (neighbours.first, neighbours.second)
    )
    if values.dtype == np.uint8:
        start *= np.float32(1 / 255)
        step *= np.float32(1 / 255)
    step -= start
    step *= neighbours.weights
    start += step
    return start


def _channels(columns: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return where the three channels of each pixel of a line lie."""
    spread: NDArray[np.int64] = (columns[:, None] * 3 + np.arange(3)).ravel()
    return spread


def _crop_grid(length: int, size: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    scale = np.float32(np.sqrt(_CROP_AREA))
    offset = (np.float32(1) - scale) / np.float32(2)
    # The kernel recomputes the box's extent from its corners, in float32.
    extent = (offset + scale) - offset
    step = (extent * np.float32(length - 1)) / np.float32(size - 1)
    position = offset * np.float32(length - 1) + np.arange(size, dtype=np.float32) * step
    first = np.floor(position).astype(np.int64)
    return first, (position - first).astype(np.float32)


def _resize(image: NDArray[np.uint8], spec: ImageSpec) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if (height, width) == (spec.size, spec.size):
        return image
    if spec.strategy == "resize-naive":
        return bicubic(image, spec.size, spec.size)
    if spec.strategy == "letterbox":
        side = max(width, height)
        pad_x, pad_y = (side - width) // 2, (side - height) // 2
        boxed = np.empty((height + 2 * pad_y, width + 2 * pad_x, 3), np.uint8)
        boxed[:] = spec.fill
        boxed[pad_y : pad_y + height, pad_x : pad_x + width] = image
        image = boxed
    return _shorter_side_center(image, spec.size)


def _shorter_side_center(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """torchvision's resize of the shorter side, then its center crop."""
    height, width = image.shape[:2]
    if width <= height:
        resized = bicubic(image, size, int(size * height / width))
    else:
        resized = bicubic(image, int(size * width / height), size)
    top = round((resized.shape[0] - size) / 2.0)
    left = round((resized.shape[1] - size) / 2.0)
    return resized[top : top + size, left : left + size]
