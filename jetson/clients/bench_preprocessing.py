"""Our preprocessing beside the naive one: PIL for geometry, float arithmetic for every pixel."""

import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qvla_export.shared.images import ImageSpec, center_crop, pixel_values, resize_like_training

_SIDE = 224
_SPEC = ImageSpec(
    _SIDE,
    "resize-naive",
    ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5)),
    ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5)),
)
# Frames one way before the other has its turn.
_TURN = 10


@dataclass(frozen=True)
class _Case:
    """One kind of frame, and what the policy's training makes necessary."""

    height: int
    width: int
    # The central 90 % of the area is taken.
    crop: bool = False
    # Through JPEG and lanczos first, as OpenVLA-OFT evaluates what has not the training's size.
    training: bool = False


# LIBERO's frames, and cameras'.
_CASES = {
    "224 x 224": _Case(224, 224),
    "224 x 224, center crop": _Case(224, 224, True),
    "256 x 256": _Case(256, 256),
    "256 x 256, center crop": _Case(256, 256, True),
    "256 x 256, JPEG, lanczos, crop": _Case(256, 256, True, True),
    "480 x 640": _Case(480, 640),
    "480 x 640, center crop": _Case(480, 640, True),
    "480 x 640, JPEG, lanczos, crop": _Case(480, 640, True, True),
    "720 x 1280": _Case(720, 1280),
    "720 x 1280, center crop": _Case(720, 1280, True),
}


@dataclass(frozen=True)
class PreprocessingTimes:
    """Milliseconds a frame, ours and the naive way, measured in turns."""

    ours_ms: NDArray[np.float64]
    naive_ms: NDArray[np.float64]

    @property
    def ratio(self) -> float:
        """Our median over the naive one."""
        return float(np.median(self.ours_ms) / np.median(self.naive_ms))

    def to_json(self) -> dict[str, float]:
        """Return medians, 99th percentiles and their ratio."""
        return {
            "ours_p50_ms": float(np.median(self.ours_ms)),
            "ours_p99_ms": float(np.percentile(self.ours_ms, 99)),
            "naive_p50_ms": float(np.median(self.naive_ms)),
            "naive_p99_ms": float(np.percentile(self.naive_ms, 99)),
            "ratio": self.ratio,
        }


def measure_preprocessing(count: int) -> Mapping[str, PreprocessingTimes]:
    """Preprocess `count` frames of each case both ways, for two vision towers."""
    return {
        name: _measure(_frame(case.height, case.width), case, count)
        for name, case in _CASES.items()
    }


def naive_pixel_values(
    frame: NDArray[np.uint8], crop: bool, training: bool = False
) -> NDArray[np.float32]:
    """Return what `pixel_values` returns, nearly: the usual few lines of PIL and numpy."""
    image = Image.fromarray(frame)
    if training:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        with Image.open(file) as decoded:
            image = decoded.convert("RGB").resize((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    if crop:
        width, height = image.size
        edge = (1 - 0.9**0.5) / 2
        box = (width * edge, height * edge, width * (1 - edge), height * (1 - edge))
        image = image.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR, box)
    image = image.resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    towers = []
    for mean, std in zip(_SPEC.means, _SPEC.stds, strict=True):
        values = np.asarray(image).astype(np.float32) / 255
        normalized = (values - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
        towers.append(normalized.transpose(2, 0, 1))
    return np.concatenate(towers)


def _ours(frame: NDArray[np.uint8], case: _Case) -> NDArray[np.float32]:
    if case.training:
        frame = resize_like_training(frame, _SIDE)
    return pixel_values(center_crop(frame, _SIDE) if case.crop else frame, _SPEC)


def _naive(frame: NDArray[np.uint8], case: _Case) -> NDArray[np.float32]:
    return naive_pixel_values(frame, case.crop, case.training)


def _frame(height: int, width: int) -> NDArray[np.uint8]:
    """Return a picture with areas, edges and some noise: JPEG's time depends on what it shows."""
    rng = np.random.default_rng(0)
    areas = Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))
    smooth = np.asarray(areas.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    noisy = smooth + rng.integers(-8, 9, smooth.shape)
    frame: NDArray[np.uint8] = np.clip(noisy, 0, 255).astype(np.uint8)
    return frame


def _measure(frame: NDArray[np.uint8], case: _Case, count: int) -> PreprocessingTimes:
    def once_ms(way: Callable[[NDArray[np.uint8], _Case], NDArray[np.float32]]) -> float:
        start_ns = time.perf_counter_ns()
        way(frame, case)
        return (time.perf_counter_ns() - start_ns) / 1e6

    def turn_ms(way: Callable[[NDArray[np.uint8], _Case], NDArray[np.float32]]) -> list[float]:
        # The first finds memory and caches as the other way left them, which no robot does.
        return [once_ms(way) for _ in range(_TURN + 1)][1:]

    turns = [(turn_ms(_ours), turn_ms(_naive)) for _ in range(-(-count // _TURN))]
    ours_ms, naive_ms = (np.concatenate(way)[:count] for way in zip(*turns, strict=True))
    return PreprocessingTimes(ours_ms, naive_ms)
