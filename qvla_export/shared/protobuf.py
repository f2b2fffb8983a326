"""Fields of a message in the protocol buffer wire format, read and written without a library.

Source: https://protobuf.dev/programming-guides/encoding.
"""

import mmap
from collections.abc import Iterator
from typing import NamedTuple

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
Span = tuple[int, int]
Data = bytes | mmap.mmap


class DamagedMessage(Exception):
    """The bytes are no message."""


class Field(NamedTuple):
    """One field of a message: its number, how it is written, and where."""

    number: int
    wire: int
    # Of the whole field, and of what it holds: a message, a text, a number.
    span: Span
    content: Span


def read_fields(data: Data, span: Span) -> Iterator[Field]:
    """Yield the fields of a message in order.

    Raises:
        DamagedMessage: they end behind their message, or are of no known kind.
    """
    at, end = span
    while at < end:
        start = at
        key, at = read_varint(data, at, end)
        number, wire = key >> 3, key & 7
        size = 0
        begin = at
        if wire == VARINT:
            _, at = read_varint(data, at, end)
        elif wire == BYTES:
            size, at = read_varint(data, at, end)
            begin = at
        elif wire in (FIXED64, FIXED32):
            size = 8 if wire == FIXED64 else 4
        else:
            raise DamagedMessage(f"field {number} has the unknown wire type {wire}")
        at += size
        if at > end:
            raise DamagedMessage("a field ends behind its message")
        yield Field(number, wire, (start, at), (begin, at))


def read_varint(data: Data, at: int, end: int) -> tuple[int, int]:
    """Return the number that starts at a place, and the place behind it.

    Raises:
        DamagedMessage: it does not end before `end`.
    """
    value = shift = 0
    while at < end and shift < 70:
        byte = data[at]
        value |= (byte & 0x7F) << shift
        at, shift = at + 1, shift + 7
        if byte < 0x80:
            return value, at
    raise DamagedMessage("a number does not end")


def read_text(data: Data, span: Span) -> str:
    """Return a text; what is no UTF-8 in it is replaced."""
    return data[span[0] : span[1]].decode("utf-8", "replace")


def number_field(number: int, value: int) -> bytes:
    """Return a field that holds a whole number of at least 0."""
    return _varint(number << 3 | VARINT) + _varint(value)


def bytes_field(number: int, content: bytes | str) -> bytes:
    """Return a field that holds a text or a message."""
    data = content.encode() if isinstance(content, str) else content
    return _varint(number << 3 | BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
