"""Frames and greetings of ZMTP, as a relay reads them; nothing is taken that did not arrive.

Source: ZMTP 3.1, https://rfc.zeromq.org/spec/37 (3.0 frames its messages alike).
"""

import asyncio
from collections.abc import AsyncIterator

# Flags of a frame.
MORE, LONG, COMMAND = 0x01, 0x02, 0x04
_GREETING_BYTES, _VERSION_AT = 64, 10
_BLOCK_BYTES = 1 << 16


class PeerEnded(Exception):
    """The connection is over, and why."""


async def pass_greeting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass a greeting on as it comes: each side waits for the other's first bytes.

    Raises:
        PeerEnded: it left, or speaks an older version.
    """
    greeting = b""
    while len(greeting) < _GREETING_BYTES:
        part = await reader.read(_GREETING_BYTES - len(greeting))
        if not part:
            raise PeerEnded("it left before it had greeted")
        greeting += part
        if greeting[_VERSION_AT : _VERSION_AT + 1] in (b"\0", b"\1", b"\2"):
            raise PeerEnded("it speaks ZMTP before 3.0")
        writer.write(part)
        await writer.drain()


async def read_head(reader: asyncio.StreamReader) -> tuple[int, int, bytes]:
    """Return flags, size and the bytes of the head of the next frame.

    Raises:
        PeerEnded: no frame has such flags.
        asyncio.IncompleteReadError: the peer left.
    """
    first = await reader.readexactly(1)
    flags = first[0]
    if flags & ~(MORE | LONG | COMMAND):
        raise PeerEnded(f"a frame with the flags {flags:#x}")
    length = await reader.readexactly(8 if flags & LONG else 1)
    return flags, int.from_bytes(length, "big"), first + length


async def read_blocks(reader: asyncio.StreamReader, size: int) -> AsyncIterator[bytes]:
    """Yield the bytes of a frame as they come.

    Raises:
        PeerEnded: the peer left in between.
    """
    while size:
        block = await reader.read(min(size, _BLOCK_BYTES))
        if not block:
            raise PeerEnded("it left in the middle of a message")
        size -= len(block)
        yield block
