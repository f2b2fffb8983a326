"""Pillow's resizes, the same bytes sooner: matrix products where Pillow has a scalar loop.

Float32 products are summed, a few outputs at a time as one small dense matrix. Such a sum is off
by less than a bound that is known, so only those as close as that to an edge of rounding, about
one in a thousand, are summed again as Pillow does.
Source: Pillow `src/libImaging/Resample.c`, read as a description.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_Floats = NDArray[np.float64]
_Places = tuple[NDArray[np.int64], NDArray[np.int64]]

_CHANNELS = 3
# Outputs of one product: more of them are more zeros in the matrix, fewer are more calls.
_TILE_ACROSS = 5
_TILE_DOWN = 4
# Multiplications of one product. OpenBLAS shares larger ones among threads that wait spinning:
# on a busy robot that made milliseconds hundreds.
_WORK = 1 << 18
_UNIT_ROUNDOFF = 2.0**-24
# Pillow's weights for bytes are integers of this.
_UNIT = 2.0**-22


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
    # Per output the inputs that it needs, and their weights; padded with weights of 0.
    # int64 and float64 [outputs, taps]
    inputs: NDArray[np.int64]
    weights: _Floats
    tiles: tuple[_Tile, ...]

    @property
    def gain(self) -> float:
        """How much larger than the largest input a sum of magnitudes can be."""
        return float(np.abs(self.weights).sum(axis=1).max())

    @property
    def roundings(self) -> int:
        """Roundings of float32 in a sum: of the products', the weights' and two to spare."""
        return len(self.weights[0]) + 3


def bicubic(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """Resize [h, w, 3] to [height, width, 3]: first across, then down, each pass rounded.

    The bytes are those of two `Image.resize` calls with BICUBIC and a size changed in each.
    """
    lines = image.reshape(len(image), -1)
    across = _filter("bicubic", image.shape[1], width, _CHANNELS)
    resized = np.empty((len(lines), width * _CHANNELS), np.uint8)
    sums = np.empty((min(_lines_of(across), len(lines)), resized.shape[1]), np.float32)
    for start in range(0, len(lines), len(sums)):
        part, out = lines[start : start + len(sums)], resized[start : start + len(sums)]
        found = sums[: len(part)]
        _sum_across(part, across, found)
        line, column = _round_sums(found, 255 * across.gain * across.roundings, out)
        output, channel = np.divmod(column, _CHANNELS)
        picked = part[line[:, None], _columns(across, output, channel)]
        out[line, column] = _bytes(_dot(picked, across.weights[output]))
    down = _filter("bicubic", len(lines), height, 1)
    result = np.empty((height, resized.shape[1]), np.uint8)
    output, column = _round_sums(_sum_down(resized, down), 255 * down.gain * down.roundings, result)
    picked = resized[down.inputs[output], column[:, None]]
    result[output, column] = _bytes(_dot(picked, down.weights[output]))
    return result.reshape(height, width, _CHANNELS)


def lanczos(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Resize [h, w, 3] to [size, size, 3] with antialiased lanczos3 in floats, rounded once.

    The bytes are those of rounding, half to even, what two `Image.resize` calls with LANCZOS make
    of each channel in mode "F": first across, then down.
    """
    lines = image.reshape(len(image), -1)
    across = _filter("lanczos", image.shape[1], size, _CHANNELS)
    resized = np.empty((len(lines), size * _CHANNELS), np.float32)
    step = _lines_of(across)
    for start in range(0, len(lines), step):
        _sum_across(lines[start : start + step], across, resized[start : start + step])
    down = _filter("lanczos", len(lines), size, 1)
    result = np.empty((size, resized.shape[1]), np.uint8)
    # Both passes' roundings, and what the second makes of the first one's.
    error = 255 * across.gain * down.gain * (across.roundings + down.roundings)
    row, column = _round_sums(_sum_down(resized, down), error, result)
    output, channel = np.divmod(column, _CHANNELS)
    picked = lines[down.inputs[row][:, :, None], _columns(across, output, channel)[:, None]]
    lines_of = _dot(picked, across.weights[output][:, None]).astype(np.float32)
    exact = _dot(lines_of, down.weights[row]).astype(np.float32)
    result[row, column] = np.clip(np.round(exact), 0, 255)
    return result.reshape(size, size, _CHANNELS)


def _lines_of(spec: _Filter) -> int:
    """Return how many lines at a time: few enough for one thread, and for the cache."""
    return max(_WORK // max(tile.matrix.size for tile in spec.tiles), 1)


def _sum_across(lines: NDArray[np.uint8], spec: _Filter, out: NDArray[np.float32]) -> None:
    numbers = lines.astype(np.float32)
    for tile in spec.tiles:
        np.matmul(numbers[:, tile.needs], tile.matrix, out=out[:, tile.gives])


def _sum_down(lines: NDArray[np.generic], spec: _Filter) -> NDArray[np.float32]:
    sums = np.empty((len(spec.weights), lines.shape[1]), np.float32)
    numbers = lines.astype(np.float32, copy=False)
    for tile in spec.tiles:
        np.matmul(tile.matrix.T, numbers[tile.needs], out=sums[tile.gives])
    return sums


def _round_sums(sums: NDArray[np.float32], roundings: float, out: NDArray[np.uint8]) -> _Places:
    """Round sums to bytes; return rows and columns of those that may be one off.

    `roundings` is how many times a unit in the last place of 1 a sum may be off.
    """
    doubt = roundings * _UNIT_ROUNDOFF
    sums += np.float32(0.5 - doubt)
    np.clip(sums, 0, 255.25, out=sums)
    # Casts cut off, which rounds down where nothing is negative.
    out[:] = sums
    sums += np.float32(2 * doubt)
    doubtful = np.flatnonzero(sums.astype(np.uint8) != out)
    rows, columns = np.divmod(doubtful, sums.shape[1])
    return rows, columns


def _columns(
    spec: _Filter, output: NDArray[np.int64], channel: NDArray[np.int64]
) -> NDArray[np.int64]:
    columns: NDArray[np.int64] = spec.inputs[output] * spec.channels + channel[:, None]
    return columns


def _dot(picked: NDArray[np.generic], weights: _Floats) -> _Floats:
    """Return sums over the last axis in float64: exact for bytes and weights of `_UNIT`."""
    sums: _Floats = np.einsum("...i,...i->...", picked.astype(np.float64), weights)
    return sums


def _bytes(sums: _Floats) -> _Floats:
    clipped: _Floats = np.clip(np.floor(sums + 0.5), 0, 255)
    return clipped


@functools.lru_cache(maxsize=32)
def _filter(kernel: str, length: int, size: int, channels: int) -> _Filter:
    """Return the filter from `length` pixels to `size`; equal lengths are left alone."""
    if length == size:
        taps, weights = np.arange(size)[:, None], np.ones((size, 1))
    else:
        taps, weights = _weights(kernel, length, size)
    step = _TILE_DOWN if channels == 1 else _TILE_ACROSS
    parts = [slice(start, min(start + step, size)) for start in range(0, size, step)]
    tiles = tuple(_tile(taps[part], weights[part], part, channels) for part in parts)
    return _Filter(channels, taps, weights, tiles)


def _weights(kernel: str, length: int, size: int) -> tuple[NDArray[np.int64], _Floats]:
    shape, reach = _KERNELS[kernel]
    scale = length / size
    spread = max(scale, 1.0)
    center = (np.arange(size) + 0.5) * scale
    first = np.maximum((center - reach * spread + 0.5).astype(np.int64), 0)
    end = np.minimum((center + reach * spread + 0.5).astype(np.int64), length)
    taps = first[:, None] + np.arange((end - first).max())
    weights = shape((taps - center[:, None] + 0.5) / spread)
    weights[taps >= end[:, None]] = 0
    # A running sum: in the order in which Pillow adds, which the last bit depends on.
    weights /= np.cumsum(weights, axis=1)[:, -1:]
    if kernel == "bicubic":
        weights = np.trunc(weights / _UNIT + np.copysign(0.5, weights)) * _UNIT
    return np.minimum(taps, length - 1), weights


def _tile(taps: NDArray[np.int64], weights: _Floats, gives: slice, channels: int) -> _Tile:
    low, high = int(taps.min()), int(taps.max()) + 1
    matrix = np.zeros((high - low, len(taps)))
    # Padding adds its zeros to the last pixel's weight.
    np.add.at(matrix, (taps - low, np.arange(len(taps))[:, None]), weights)
    # Each channel of an output takes that channel of the inputs.
    spelled = np.kron(matrix, np.eye(channels)).astype(np.float32)
    return _Tile(
        slice(low * channels, high * channels),
        slice(gives.start * channels, gives.stop * channels),
        spelled,
    )


def _cubic(x: _Floats) -> _Floats:
    """Keys' kernel with a = -0.5, in the order in which Pillow multiplies."""
    x = np.abs(x)
    near = (1.5 * x - 2.5) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos3(x: _Floats) -> _Floats:
    return np.where((x >= -3) & (x < 3), np.sinc(x) * np.sinc(x / 3), 0)


# Shape, and how far it reaches where nothing is made smaller.
_KERNELS: dict[str, tuple[Callable[[_Floats], _Floats], float]] = {
    "bicubic": (_cubic, 2),
    "lanczos": (_lanczos3, 3),
}
