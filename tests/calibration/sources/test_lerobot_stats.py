"""Statistics and pictures of a dataset against plain numpy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from calibration.sources.image_codec import decode_png, encode_png
from calibration.sources.lerobot_stats import image_stats, merge_stats, vector_stats


@given(seed=st.integers(0, 1000), low=st.integers(0, 255), span=st.integers(0, 255))
def test_image_statistics_equal_those_of_the_pixels(seed: int, low: int, span: int) -> None:
    random = np.random.default_rng(seed)
    high = min(256, low + span + 1)
    pictures = random.integers(low, high, (3, 5, 4, 3), dtype=np.uint8)
    stats = image_stats([encode_png(picture) for picture in pictures])
    exact = vector_stats(pictures.reshape(-1, 3) / 255)
    for name in ("min", "max", "mean", "std"):
        assert np.allclose(stats[name].ravel(), exact[name])
    assert np.all(np.abs(stats["q50"].ravel() - exact["q50"]) <= (high - low) / 255)
    assert stats["count"] == [3]


def test_merged_statistics_equal_those_of_everything() -> None:
    random = np.random.default_rng(0)
    parts = [random.normal(i, 1 + i, (n, 2)) for i, n in enumerate((3, 10, 1))]
    merged = merge_stats([vector_stats(part) for part in parts])
    exact = vector_stats(np.concatenate(parts))
    for name in ("min", "max", "mean", "std", "count"):
        assert np.allclose(merged[name], exact[name])


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_png_loses_nothing(height: int, width: int, seed: int) -> None:
    shape = (height, width, 3)
    picture = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(decode_png(encode_png(picture)), picture)
