"""msgpack without trust: few values, nested little, counted before an object is made.

A message's heads are walked first, its texts and bytes passed over (`structure` says why); a walk
also finds a token without unpacking what comes from somebody who has none.
Format: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack

from jetson.errors import WireError
from jetson.serving.structure import StructureCount, StructureLimits

# First byte -> bytes of the length of a text or bytes; and of the count of a list or map, with
# the values that each counts for; and of a single value.
_LONG = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_CONTAINERS = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
_FIXED = {
    0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8,
    0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8,
}  # fmt: skip


def unpack_map(body: bytes | bytearray, limits: StructureLimits) -> dict[Any, Any]:
    """Return the map that a message holds; keys are str or bytes.

    Raises:
        WireError: the message is damaged, not a map, or beyond the limits.
    """
    value = unpack_message(body, limits)
    if not isinstance(value, dict):
        raise WireError(f"the message must be a msgpack map, got {type(value).__name__}")
    return value


def unpack_message(body: bytes | bytearray, limits: StructureLimits) -> Any:
    """Return the map, list or scalar that a message holds.

    Raises:
        WireError: the message is damaged or beyond the limits.
    """
    try:
        for _ in _walk(memoryview(body), limits):
            pass
        return msgpack.unpackb(body, raw=False, max_ext_len=0)
    # Besides ValueError msgpack raises bare exceptions of its own and, for UTF-8, UnicodeError.
    except (ValueError, TypeError, msgpack.UnpackException, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise WireError(f"the message must be msgpack: {reason:.200}") from None


def text_field(
    body: bytes | bytearray | memoryview, name: str, limits: StructureLimits
) -> str | None:
    """Return a text of a message's outermost map, nothing else being unpacked; None without one.

    Raises:
        WireError: the message is damaged or beyond the limits.
    """
    view, key, found = memoryview(body), None, None
    try:
        for depth, position, text in _walk(view, limits):
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


class _Head(NamedTuple):
    """What the head of a value says."""

    # Where the next value begins.
    end: int
    # Values inside, names among them.
    inside: int = 0
    is_list: bool = False
    is_map: bool = False
    is_number: bool = False
    # Of texts and bytes.
    text: memoryview | None = None


def _walk(
    body: memoryview, limits: StructureLimits
) -> Iterator[tuple[int, int, memoryview | None]]:
    """Yield depth, place in its container and, of texts, the bytes, of each value of a message.

    Raises:
        ValueError: it ends early, goes on behind its end, or is beyond the limits.
    """
    count, at = StructureCount(limits), 0
    # What is left of each container around, and its head; outermost, the message.
    left, around = [1], [_Head(0, 1)]
    while left:
        if not left[-1]:
            left.pop()
            around.pop()
            continue
        depth, position = len(left) - 1, around[-1].inside - left[-1]
        left[-1] -= 1
        head = _head(body, at)
        at = head.end
        if not around[-1].is_map or position % 2:
            count.add(head.is_number and around[-1].is_list)
        elif head.text is None:
            raise ValueError("a name in a map is no text")
        yield depth, position, head.text
        if head.is_list or head.is_map:
            count.enter(len(left))
            left.append(head.inside)
            around.append(head)
    if at != len(body):
        raise ValueError(f"{len(body) - at} bytes follow its end")


def _head(body: memoryview, at: int) -> _Head:
    first, at = _number(body, at, 1)
    if first < 0x80 or first >= 0xE0:  # small numbers
        return _Head(at, is_number=True)
    if first < 0x90:
        return _Head(at, 2 * (first & 0x0F), is_map=True)
    if first < 0xA0:
        return _Head(at, first & 0x0F, is_list=True)
    if first < 0xC0:
        return _text(body, at, first & 0x1F)
    if first in _FIXED:
        return _Head(_within(body, at + _FIXED[first]), is_number=_FIXED[first] > 0)
    if first in _CONTAINERS:
        width, each = _CONTAINERS[first]
        size, at = _number(body, at, width)
        return _Head(at, each * size, is_list=each == 1, is_map=each == 2)
    if first in _LONG:
        size, at = _number(body, at, _LONG[first])
        return _text(body, at, size)
    raise ValueError(f"the type {first:#x} is not of an observation")


def _text(body: memoryview, at: int, size: int) -> _Head:
    end = _within(body, at + size)
    return _Head(end, text=body[at:end])


def _number(body: memoryview, at: int, width: int) -> tuple[int, int]:
    end = _within(body, at + width)
    return int.from_bytes(body[at:end], "big"), end


def _within(body: memoryview, end: int) -> int:
    if end > len(body):
        raise ValueError("it ends early")
    return end
