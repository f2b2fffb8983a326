"""A client of GR00T's ZMQ protocol.

There is no client on PyPI: the one here is written from the protocol's description (REQ socket,
one msgpack map a request, arrays as the bytes of np.save).
"""

import io
from typing import Any

import msgpack
import numpy as np
import zmq


def npy(array: Any) -> dict[str, Any]:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return {"__ndarray_class__": True, "as_npy": file.getvalue()}


def from_npy(value: dict[str, Any]) -> Any:
    if "__ndarray_class__" in value:
        return np.load(io.BytesIO(value["as_npy"]), allow_pickle=False)
    return value


class Gr00tClient:
    def __init__(self, port: int, token: str | None = None) -> None:
        self.token = token
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.REQ)
        self.socket.setsockopt(zmq.RCVTIMEO, 20_000)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(f"tcp://127.0.0.1:{port}")

    def send(self, message: bytes) -> Any:
        self.socket.send(message)
        return msgpack.unpackb(self.socket.recv(), object_hook=from_npy)

    def call(self, endpoint: str, data: Any = None) -> Any:
        request = {"endpoint": endpoint, "data": data, "api_token": self.token}
        return self.send(msgpack.packb({k: v for k, v in request.items() if v is not None}))

    def get_action(self, observation: Any) -> Any:
        return self.call("get_action", {"observation": observation, "options": None})

    def __enter__(self) -> "Gr00tClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.destroy(linger=0)
