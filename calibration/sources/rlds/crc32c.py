"""CRC-32C (Castagnoli, RFC 3720), in numpy: many parts of the data side by side."""

from functools import cache

import numpy as np
from numpy.typing import NDArray

# Reversed polynomial.
_POLYNOMIAL = 0x82F63B78
_SHORT_BYTES = 64


def crc32c(data: bytes | memoryview) -> int:
    """Return the checksum of bytes."""
    values = np.frombuffer(data, np.uint8)
    # As many parts as a part is long: joining them then costs less than walking along them.
    parts = 1 << len(values).bit_length() // 2 if len(values) > _SHORT_BYTES else 1
    length = len(values) // parts if parts > 1 else 0
    table = _table()
    # Parts but the first begin with zero: joining adds what precedes them.
    sums = np.zeros(parts, np.uint32)
    sums[0] = 0xFFFFFFFF
    for column in np.ascontiguousarray(values[: parts * length].reshape(parts, length).T):
        sums = table[(sums ^ column) & 0xFF] ^ (sums >> np.uint32(8))
    while len(sums) > 1:
        # A sum followed by zeros as long as its neighbour, and the neighbour's own.
        sums = _apply(_zeros(length), sums[0::2]) ^ sums[1::2]
        length *= 2
    total = int(sums[0])
    for byte in values[length:].tolist():
        total = int(table[(total ^ byte) & 0xFF]) ^ total >> 8
    return total ^ 0xFFFFFFFF


def masked_crc32c(data: bytes | memoryview) -> int:
    """Return the checksum as TFRecord files store it: rotated by 15 bits, plus a constant."""
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


@cache
def _table() -> NDArray[np.uint32]:
    """What one byte does to a sum of zero.  uint32 [256]"""
    values = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        values = (values >> np.uint32(1)) ^ (np.uint32(_POLYNOMIAL) * (values & np.uint32(1)))
    return values


@cache
def _zeros(length: int) -> tuple[int, ...]:
    """What so many zero bytes do to each bit of a sum: 32 numbers, a matrix over GF(2)."""
    if length == 1:
        table = _table()
        bits = np.uint32(1) << np.arange(32, dtype=np.uint32)
        after = table[bits & np.uint32(0xFF)] ^ (bits >> np.uint32(8))
        return tuple(int(value) for value in after)
    half = _zeros(length // 2)
    twice = _apply(half, np.array(half, np.uint32))
    if length % 2:
        twice = _apply(_zeros(1), twice)
    return tuple(int(value) for value in twice)


def _apply(matrix: tuple[int, ...], sums: NDArray[np.uint32]) -> NDArray[np.uint32]:
    result = np.zeros_like(sums)
    for bit, column in enumerate(matrix):
        result ^= np.uint32(column) * ((sums >> np.uint32(bit)) & np.uint32(1))
    return result
