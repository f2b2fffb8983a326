"""Pillow's bicubic resize, the same bytes sooner: matrix products where Pillow has a scalar loop.

Pillow sums bytes times integers of 2^-22 and rounds. Here float32 products of the same numbers
are summed, a few outputs at a time as one small dense matrix. Such a sum is off by less than a
bound that is known, so only those as close as that to an edge of rounding, about one in a
thousand, are summed again in integers.
Source: Pillow `src/libImaging/Resample.c`, read as a description.
"""

import functools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHANNELS = 3
_ONE = 1 << 22
# Outputs of one product: more of them are more zeros in the matrix, fewer are more calls.
_TILE_ACROSS = 5
_TILE_DOWN = 4
# Multiplications of one product. OpenBLAS shares larger ones among threads that wait spinning:
# on a busy robot that made milliseconds hundreds.
_WORK = 1 << 18
_UNIT_ROUNDOFF = 2.0**-24


@dataclass(frozen=True)
class _Tile:
    """Some neighbouring outputs: the slice they need, the slice they are, float32 [in, out]."""

    needs: slice
    gives: slice
    matrix: NDArray[np.float32]


@dataclass(frozen=True)
class _Filter:
    """One pass over lines whose pixels are `channels` numbers in a row."""

    channels: int
    # Per output the inputs that it needs, and their weights in units of 2^-22; padded with
    # weights of 0.  int64 [outputs, taps]
    inputs: NDArray[np.int64]
    weights: NDArray[np.int64]
    tiles: tuple[_Tile, ...]
    # How far a sum in float32 may be from the exact one.
    doubt: float


def bicubic(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resize [h, w, 3] to [height, width, 3]: first across, then down, each pass rounded.

    The bytes are those of two `Image.resize` calls with BICUBIC and a size changed in each.
    """
    rows, columns = image.shape[:2]
    lines = image.reshape(rows, columns * _CHANNELS)
    if columns != width:
        lines = _across(lines, _filter(columns, width, _CHANNELS))
    if rows != height:
        lines = _down(lines, _filter(rows, height, 1))
    return lines.reshape(height, width, _CHANNELS)


def _across(lines: NDArray[np.uint8], spec: _Filter) -> NDArray[np.uint8]:
    """Return every line filtered.  uint8 [lines, outputs * channels]"""
    filtered = np.empty((len(lines), len(spec.weights) * spec.channels), np.uint8)
    # Some lines at a time: that also keeps them in the cache.
    count = min(max(_WORK // max(tile.matrix.size for tile in spec.tiles), 1), len(lines))
    sums = np.empty((count, filtered.shape[1]), np.float32)
    for start in range(0, len(lines), count):
        part, out = lines[start : start + count], filtered[start : start + count]
        for tile in spec.tiles:
            needed = part[:, tile.needs].astype(np.float32)
            np.matmul(needed, tile.matrix, out=sums[: len(part), tile.gives])
        line, column = _rounded(sums[: len(part)], spec.doubt, out)
        output, channel = np.divmod(column, spec.channels)
        picked = part[line[:, None], spec.inputs[output] * spec.channels + channel[:, None]]
        out[line, column] = _exact(picked, spec.weights[output])
    return filtered


def _down(lines: NDArray[np.uint8], spec: _Filter) -> NDArray[np.uint8]:
    """Return every column filtered.  uint8 [outputs, columns]"""
    sums = np.empty((len(spec.weights), lines.shape[1]), np.float32)
    for tile in spec.tiles:
        np.matmul(tile.matrix.T, lines[tile.needs].astype(np.float32), out=sums[tile.gives])
    filtered = np.empty(sums.shape, np.uint8)
    output, column = _rounded(sums, spec.doubt, filtered)
    picked = lines[spec.inputs[output], column[:, None]]
    filtered[output, column] = _exact(picked, spec.weights[output])
    return filtered


def _rounded(
    sums: NDArray[np.float32], doubt: float, out: NDArray[np.uint8]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Round sums to bytes; return rows and columns of those that may be one off."""
    sums += np.float32(0.5 - doubt)
    np.clip(sums, 0, 255.25, out=sums)
    # Casts cut off, which rounds down where nothing is negative.
    out[:] = sums
    sums += np.float32(2 * doubt)
    doubtful = np.flatnonzero(sums.astype(np.uint8) != out)
    rows, columns = np.divmod(doubtful, sums.shape[1])
    return rows, columns


def _exact(pixels: NDArray[np.generic], weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the rounded sums of [n, taps] pixels as Pillow computes them."""
    sums = np.einsum("ij,ij->i", pixels.astype(np.int64), weights)
    exact: NDArray[np.int64] = np.clip((sums + _ONE // 2) // _ONE, 0, 255)
    return exact


@functools.lru_cache(maxsize=32)
def _filter(length: int, size: int, channels: int) -> _Filter:
    """Return the filter from `length` pixels to `size`."""
    scale = length / size
    spread = max(scale, 1.0)
    center = (np.arange(size) + 0.5) * scale
    first = np.maximum((center - 2 * spread + 0.5).astype(np.int64), 0)
    end = np.minimum((center + 2 * spread + 0.5).astype(np.int64), length)
    taps = first[:, None] + np.arange((end - first).max())
    weights = _cubic((taps - center[:, None] + 0.5) / spread)
    weights[taps >= end[:, None]] = 0
    # A running sum: in the order in which Pillow adds, which the last bit depends on.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    units = np.trunc(weights * _ONE + np.copysign(0.5, weights)).astype(np.int64)
    taps = np.minimum(taps, length - 1)
    step = _TILE_DOWN if channels == 1 else _TILE_ACROSS
    tiles = [
        _tile(taps[start : start + step], units[start : start + step], start, channels)
        for start in range(0, size, step)
    ]
    largest = 255 * np.abs(units).sum(axis=1).max() / _ONE
    # Of a sum of n products in any order, and one for the bound itself.
    doubt = (taps.shape[1] + 2) * _UNIT_ROUNDOFF * largest
    return _Filter(channels, taps, units, tuple(tiles), float(doubt))


def _tile(taps: NDArray[np.int64], units: NDArray[np.int64], start: int, channels: int) -> _Tile:
    low, high = int(taps.min()), int(taps.max()) + 1
    matrix = np.zeros((high - low, len(taps)))
    # Padding adds its zeros to the last pixel's weight.
    np.add.at(matrix, (taps - low, np.arange(len(taps))[:, None]), units / _ONE)
    # Each channel of an output takes that channel of the inputs.
    spelled = np.kron(matrix, np.eye(channels)).astype(np.float32)
    return _Tile(
        slice(low * channels, high * channels),
        slice(start * channels, (start + len(taps)) * channels),
        spelled,
    )


def _cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Keys' kernel with a = -0.5, in the order in which Pillow multiplies."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))
