"""Resized images have Pillow's bytes, whatever their sizes and contents."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from qvla_export.shared.images import center_crop
from qvla_export.shared.pictures.resampling import bicubic, lanczos


def pillow(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    across = Image.fromarray(image).resize((width, image.shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(across.resize((width, height), Image.Resampling.BICUBIC))


sides = st.integers(1, 90)


@given(sides, sides, sides, sides, st.sampled_from([2, 3, 9, 256]), st.integers(0, 2**32 - 1))
def test_bytes_are_pillows(
    height: int, width: int, to_height: int, to_width: int, levels: int, seed: int
) -> None:
    # Few levels far apart make sums that lie exactly between two bytes, and overshoot.
    drawn = np.random.default_rng(seed).integers(0, levels, (height, width, 3))
    image = (drawn * (255 // (levels - 1))).astype(np.uint8)
    np.testing.assert_array_equal(
        bicubic(image, to_width, to_height), pillow(image, to_width, to_height)
    )


def pillow_floats(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    planes = []
    for channel in range(3):
        plane = Image.fromarray(image[:, :, channel].astype(np.float32))
        across = plane.resize((size, image.shape[0]), Image.Resampling.LANCZOS)
        planes.append(np.asarray(across.resize((size, size), Image.Resampling.LANCZOS)))
    return np.clip(np.round(np.stack(planes, axis=-1)), 0, 255).astype(np.uint8)


@given(sides, sides, sides, st.sampled_from([2, 3, 9, 256]), st.integers(0, 2**32 - 1))
def test_lanczos_is_pillows_in_floats(
    height: int, width: int, size: int, levels: int, seed: int
) -> None:
    drawn = np.random.default_rng(seed).integers(0, levels, (height, width, 3))
    image = (drawn * (255 // (levels - 1))).astype(np.uint8)
    np.testing.assert_array_equal(lanczos(image, size), pillow_floats(image, size))


@pytest.mark.parametrize(("height", "width"), [(480, 640), (720, 1280), (256, 256), (1500, 7)])
def test_cameras_frames(height: int, width: int) -> None:
    rng = np.random.default_rng(height)
    noise = rng.integers(0, 256, (height, width, 3), np.uint8)
    steps = np.where(noise > 127, 255, 0).astype(np.uint8)
    ramp = np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8)
    for image in (noise, steps, np.stack([ramp, ramp // 2, ramp[::-1]], -1), noise[:, ::-1]):
        np.testing.assert_array_equal(bicubic(image, 224, 224), pillow(image, 224, 224))
    np.testing.assert_array_equal(lanczos(noise, 224), pillow_floats(noise, 224))


def test_halving_a_checkerboard_rounds_ties_up() -> None:
    # Every sum is near 0.5, where float32 alone could go either way.
    board = np.indices((64, 64)).sum(0) % 2
    image = np.repeat(board[:, :, None], 3, -1).astype(np.uint8)
    halved = bicubic(image, 32, 64)
    np.testing.assert_array_equal(halved, pillow(image, 32, 64))
    assert halved[:, 2:-2].min() == 1


def cropped(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """tf.image.crop_and_resize of the central 90 %, pixel by pixel as its kernel goes."""
    one = np.float32
    scale = one(np.sqrt(0.9))
    offset = (one(1) - scale) / one(2)
    grids = []
    for length in image.shape[:2]:
        step = ((offset + scale) - offset) * one(length - 1) / one(size - 1)
        grids.append([offset * one(length - 1) + one(index) * step for index in range(size)])
    out = np.empty((size, size, 3), np.uint8)
    values = image.astype(np.float32) * one(1 / 255)
    for row, y in enumerate(grids[0]):
        for column, x in enumerate(grids[1]):
            top, left = int(y), int(x)
            bottom, right = min(top + 1, image.shape[0] - 1), min(left + 1, image.shape[1] - 1)
            across = [
                values[line, left] + (values[line, right] - values[line, left]) * one(x - left)
                for line in (top, bottom)
            ]
            mixed = across[0] + (across[1] - across[0]) * one(y - top)
            out[row, column] = (np.clip(mixed, 0, 1) * one(255.5)).astype(np.uint8)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (3, 200), (40, 40), (97, 61)])
@pytest.mark.parametrize("size", [2, 33, 70])
def test_a_crop_is_the_formula_pixel_by_pixel(shape: tuple[int, int], size: int) -> None:
    image = np.random.default_rng(size).integers(0, 256, (*shape, 3), np.uint8)
    np.testing.assert_array_equal(center_crop(image, size), cropped(image, size))
