"""msgpack without trust: few values, nested little, counted before an object is made.

An unpacker makes whatever a message says: 32 MB of empty lists are seconds of work with the
interpreter held. So a message's heads are walked first, its texts and bytes passed over; a walk
also finds a token without unpacking what comes from somebody who has none.
Format: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from collections.abc import Iterator
from typing import Any

import msgpack

from jetson.errors import WireError

# An observation of four cameras in openpi's form has fewer than 64 values in four levels; a state
# may be a list of numbers.
_MAX_VALUES = 1024
_MAX_DEPTH = 8
# First byte -> bytes of the length of a text or bytes; and of the count of a list or map, with
# the values that each counts for.
_LONG = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
_FIXED = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip


def unpack_map(body: bytes | bytearray) -> dict[Any, Any]:
    """Return the map that a message holds; keys are str or bytes.

    Raises:
        WireError: the message is damaged, not a map, or larger than an observation can be.
    """
    value = unpack_message(body)
    if not isinstance(value, dict):
        raise WireError(f"the message must be a msgpack map, got {type(value).__name__}")
    return value


def unpack_message(body: bytes | bytearray) -> Any:
    """Return the map, list or scalar that a message holds.

    Raises:
        WireError: the message is damaged or larger than an observation can be.
    """
    try:
        for _ in _walk(memoryview(body)):
            pass
        return msgpack.unpackb(body, raw=False, max_ext_len=0)
    # Besides ValueError msgpack raises bare exceptions of its own and, for UTF-8, UnicodeError.
    except (ValueError, TypeError, msgpack.UnpackException, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise WireError(f"the message must be msgpack: {reason:.200}") from None


def text_field(body: bytes | bytearray | memoryview, name: str) -> str | None:
    """Return a text of a message's outermost map, nothing else being unpacked; None without one.

    Raises:
        WireError: the message is damaged or larger than an observation can be.
    """
    view, key, found = memoryview(body), None, None
    try:
        for depth, position, text in _walk(view):
            if depth != 1:
                continue
            if position % 2 == 0:
                key = text
            elif key is not None and key == name.encode() and text is not None:
                found = bytes(text)
    except ValueError as error:
        raise WireError(f"the message must be msgpack: {error}") from None
    return None if found is None else found.decode("utf-8", "replace")


def pack(value: Any) -> bytes:
    """Return a value as one msgpack message."""
    packed: bytes = msgpack.packb(value)
    return packed


def _walk(body: memoryview) -> Iterator[tuple[int, int, memoryview | None]]:
    """Yield depth, place in its container and, of texts, the bytes, of each value of a message.

    Raises:
        ValueError: it ends early, goes on behind its end, or is larger than an observation can be.
    """
    at, count = 0, 0
    # What is left of each open container, and how many values it has.
    left, sizes = [1], [1]
    while left:
        if not left[-1]:
            left.pop()
            sizes.pop()
            continue
        depth, position = len(left) - 1, sizes[-1] - left[-1]
        left[-1] -= 1
        count += 1
        if count > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES} values; send arrays as bytes")
        values, at, text = _value(body, at)
        yield depth, position, text
        if values:
            if len(left) > _MAX_DEPTH:
                raise ValueError(f"nested more than {_MAX_DEPTH} deep")
            left.append(values)
            sizes.append(values)
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes follow its end")


def _value(body: memoryview, at: int) -> tuple[int, int, memoryview | None]:
    """Return how many values follow inside this one, where the next begins, and a text's bytes."""
    first, at = _number(body, at, 1)
    if first < 0x80 or first >= 0xE0:  # small numbers
        return 0, at, None
    if first < 0x90:
        return 2 * (first & 0x0F), at, None
    if first < 0xA0:
        return first & 0x0F, at, None
    if first < 0xC0:
        return _text(body, at, first & 0x1F)
    if first in _FIXED:
        return 0, _within(body, at + _FIXED[first]), None
    if first in _CONTAINERS:
        width, each = _CONTAINERS[first]
        size, at = _number(body, at, width)
        return each * size, at, None
    if first in _LONG:
        size, at = _number(body, at, _LONG[first])
        return _text(body, at, size)
    raise ValueError(f"the type {first:#x} is not of an observation")


def _text(body: memoryview, at: int, size: int) -> tuple[int, int, memoryview | None]:
    end = _within(body, at + size)
    return 0, end, body[at:end]


def _number(body: memoryview, at: int, width: int) -> tuple[int, int]:
    end = _within(body, at + width)
    return int.from_bytes(body[at:end], "big"), end


def _within(body: memoryview, end: int) -> int:
    if end > len(body):
        raise ValueError("it ends early")
    return end
