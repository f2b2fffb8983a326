"""A peer of ZMTP that says what a test lets it say, byte by byte."""

import socket
from contextlib import ExitStack

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x01NULL" + bytes(16 + 1 + 31)
READY = b"\x05READY\x0bSocket-Type\0\0\0\x06DEALER\x08Identity\0\0\0\0"


def peer(port: int, stack: ExitStack) -> socket.socket:
    """A peer that has greeted and said what it is."""
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
    client.sendall(GREETING + b"\x04" + bytes([len(READY)]) + READY)
    return client


def long_frame(flags: int, size: int) -> bytes:
    return bytes([flags | 2]) + size.to_bytes(8, "big")
