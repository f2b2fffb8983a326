"""The PTX that unpacks four bytes at once, evaluated here for every byte and whole factor."""

import re
from collections.abc import Callable

import numpy as np
import pytest

from engines.kernels.packed_bytes import HALVES, INTEGERS

BYTES = np.arange(256)
MASK = np.uint64(0xFFFFFFFF)


def lop3(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Look every bit of three words up in a table of eight (PTX ISA, lop3.b32)."""
    found = np.zeros_like(a)
    for row in range(8):
        if int(table.flat[0]) >> row & 1:
            terms = [w if row & bit else ~w & MASK for w, bit in ((a, 4), (b, 2), (c, 1))]
            found = found | (terms[0] & terms[1] & terms[2])
    return found


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """Pick four of the eight bytes of two words (PTX ISA, prmt.b32)."""
    both = a | b << np.uint64(32)
    found = np.zeros_like(a)
    for place in range(4):
        chosen = int(selector.flat[0]) >> 4 * place & 7
        found = found | (both >> np.uint64(8 * chosen) & np.uint64(255)) << np.uint64(8 * place)
    return found


def in_halves(operate: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    def both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        halves = [w.astype(np.uint32).view(np.float16) for w in (a, b)]
        return operate(*halves).view(np.uint32).astype(np.uint64)

    return both


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lop3,
    "prmt.b32": prmt,
    "mul.lo.u32": lambda a, b: a * b & MASK,
    "sub.u32": lambda a, b: a - b & MASK,
    "mad.lo.u32": lambda a, b, c: a * b + c & MASK,
    "xor.b32": lambda a, b: a ^ b,
    "mov.b32": lambda a: a,
    "sub.f16x2": in_halves(np.subtract),
    "mul.f16x2": in_halves(np.multiply),
}


def evaluated(text: str, operands: dict[str, np.ndarray], outputs: int) -> list[np.ndarray]:
    """Run a text over words; an operation that is not listed here fails."""
    values = dict(operands)
    shape = np.broadcast(*operands.values()).shape
    for line in text.strip("{} ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, rest = line.split(maxsplit=1)
        target, *sources = [word.strip() for word in rest.split(",")]
        words = [
            np.broadcast_to(values[s] if s in values else np.uint64(int(s, 0)), shape)
            for s in sources
        ]
        values[target] = OPERATIONS[name](*[np.ascontiguousarray(word) for word in words])
    return [values[f"${number}"] for number in range(outputs)]


def codes_of(bits: int, part: int) -> np.ndarray:
    """Return the code at one place of every byte."""
    code = BYTES >> bits * part & (1 << bits) - 1
    return np.where(code >= 1 << (bits - 1), code - (1 << bits), code)


def words_of(order: np.ndarray) -> np.ndarray:
    """Return words whose four bytes are a byte and three others of an order."""
    others = [np.roll(order, 67 * place) for place in range(4)]
    return sum(o.astype(np.uint64) << np.uint64(8 * n) for n, o in enumerate(others))


@pytest.mark.parametrize("bits", [2, 4])
def test_integers_are_codes_times_factors(bits: int) -> None:
    factors = np.arange(1, (128 >> (bits - 1)) + 1, dtype=np.uint64)
    for part, text in enumerate(INTEGERS[bits]):
        operands = {"$1": words_of(BYTES)[None, :], "$2": factors[:, None]}
        (found,) = evaluated(text, operands, 1)
        expected = codes_of(bits, part)[None, :] * factors[:, None].astype(int)
        for place in range(4):
            got = (found >> np.uint64(8 * place) & np.uint64(255)).astype(np.uint8).view(np.int8)
            np.testing.assert_array_equal(got, np.roll(expected, 67 * place, axis=1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_halves_are_codes_times_factors(bits: int) -> None:
    whole = range(1, (128 >> (bits - 1)) + 1)
    factors = np.array([*whole, 3, 16, 0.3701, 0.001, 2.0**-14], np.float16)
    twice = factors.view(np.uint16).astype(np.uint64) * np.uint64(0x10001)
    for part, text in enumerate(HALVES[bits]):
        words = {"$2": words_of(BYTES)[None, :]}
        found = evaluated(text, words | dict.fromkeys(("$3", "$4"), twice[:, None]), 2)
        expected = codes_of(bits, part)[None, :].astype(np.float16) * factors[:, None]
        for place in range(4):
            bits16 = found[place // 2] >> np.uint64(16 * (place % 2)) & np.uint64(0xFFFF)
            got = bits16.astype(np.uint16).view(np.float16)
            # A zero of either sign is 0.
            np.testing.assert_array_equal(got, np.roll(expected, 67 * place, axis=1))


def test_every_operation_is_evaluated() -> None:
    texts = [text for table in (INTEGERS, HALVES) for row in table.values() for text in row]
    used = {name for text in texts for name in re.findall(r"[a-z0-9]+\.(?:[a-z0-9]+\.?)+", text)}
    assert used == set(OPERATIONS)
