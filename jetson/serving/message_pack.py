"""msgpack without trust: maps, lists and scalars of bounded size; no extension types."""

from typing import Any

import msgpack

from jetson.errors import WireError

# An array's declared length is allocated before its items are read, at every depth.
_MAX_LIST = 4096
_MAX_MAP = 256


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
        return msgpack.unpackb(
            body,
            raw=False,
            max_array_len=_MAX_LIST,
            max_map_len=_MAX_MAP,
            max_ext_len=0,
        )
    # Besides ValueError msgpack raises bare exceptions of its own and, for UTF-8, UnicodeError.
    except (ValueError, msgpack.UnpackException, RecursionError, OverflowError) as error:
        reason = str(error) or type(error).__name__
        raise WireError(f"the message must be msgpack: {reason:.200}") from None


def pack(value: Any) -> bytes:
    """Return a value as one msgpack message."""
    packed: bytes = msgpack.packb(value)
    return packed
