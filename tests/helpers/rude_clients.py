"""Clients that say less, or more, than they should; spelled byte by byte."""

import struct
from contextlib import ExitStack

import msgpack
import numpy as np
from echo_policy import IMAGE, oft_fields
from gr00t_client import npy
from openpi_client import msgpack_numpy
from websockets.sync.client import ClientConnection, connect

# Of a body that does not come.
HEAD = b"POST /act HTTP/1.1\r\nHost: localhost\r\nContent-Length: 30000000\r\n\r\n{"


def place_of(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def websocket_client(url: str, stack: ExitStack) -> ClientConnection:
    client = connect(url.replace("http", "ws", 1), compression=None, max_size=None, proxy=None)
    stack.enter_context(client)
    client.recv(timeout=20)
    return client


def acts(client: ClientConnection) -> bool:
    client.send(msgpack_numpy.packb(oft_fields()))
    return msgpack_numpy.unpackb(client.recv(timeout=20))["actions"].shape == (4, 7)


def zmq_request(instruction: str) -> bytes:
    images = {name: npy(IMAGE[None, None]) for name in ("front", "hand")}
    seen = {"state": {"state": npy(np.zeros((1, 1, 8)))}, "language": {"task": [[instruction]]}}
    return msgpack.packb({"data": {"observation": {"video": images, **seen}}})


def raw_frame(first: int, declared: int, payload: bytes = b"") -> bytes:
    """A masked frame (with the mask 0) that may declare more than it has."""
    return struct.pack("!BBQ", first, 0x80 | 127, declared) + bytes(4) + payload
