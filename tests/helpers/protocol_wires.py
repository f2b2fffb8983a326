"""One observation in every protocol: spelled, sent, and read as upstream's decoders read it."""

import json
from collections.abc import Callable
from http.client import HTTPConnection
from typing import Any, Protocol

import json_numpy
import msgpack
import numpy as np
from gr00t_client import Gr00tClient, from_npy, npy
from openpi_client import msgpack_numpy
from vla_eval_client import VlaEvalWire, from_tagged
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

IMAGE = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)


class Wire(Protocol):
    """One protocol: how to spell an observation, send it and read it as upstream does."""

    def fields(self) -> dict[str, Any]: ...

    def array(self, array: Any) -> Any: ...

    def encode(self, fields: dict[str, Any]) -> bytes: ...

    def send(self, body: bytes) -> str | None:
        """Return None where the reply is an action, and the reason where it is none."""
        ...

    def upstream(self, body: bytes) -> list[Any]:
        """Return every value that upstream's decoder finds in a body."""
        ...

    def close(self) -> None: ...


def leaves(value: Any) -> list[Any]:
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return [value, *(leaf for item in inner for leaf in leaves(item))]
    return [value]


def readable(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return upstream's hook, but leave alone what it cannot read: nobody has to use it."""

    def read(value: Any) -> Any:
        try:
            return hook(value)
        except Exception:
            return value

    return read


class ActWire:
    def __init__(self, url: str, _: int) -> None:
        host, port = url.removeprefix("http://").split(":")
        self.http = HTTPConnection(host, int(port), timeout=20)

    def fields(self) -> dict[str, Any]:
        images = {"full_image": self.array(IMAGE), "wrist_image": self.array(IMAGE + 1)}
        return {**images, "state": self.array(np.zeros(8)), "instruction": "push"}

    def array(self, array: Any) -> Any:
        return json_numpy.default(array)

    def encode(self, fields: dict[str, Any]) -> bytes:
        return json.dumps(fields).encode()

    def send(self, body: bytes) -> str | None:
        self.http.request("POST", "/act", body)
        reply = self.http.getresponse()
        content = json.loads(reply.read())
        if reply.status == 200:
            assert len(content) in (4, 7) or "__numpy__" in content
            return None
        assert reply.status in (400, 413, 422), content
        assert set(content) == {"error", "kind"} and content["error"]
        return str(content["error"])

    def upstream(self, body: bytes) -> list[Any]:
        hook = readable(json_numpy.object_hook)
        value = json.loads(body, object_hook=hook)
        if "encoded" in value:
            value = json.loads(value["encoded"], object_hook=hook)
        return leaves(value)

    def close(self) -> None:
        self.http.close()


class OpenpiWire:
    def __init__(self, url: str, _: int) -> None:
        self.url = url.replace("http", "ws")
        self.connect()

    def connect(self) -> None:
        # Without pings: they draw from `random`, which hypothesis wants for itself.
        self.manager = connect(
            self.url, compression=None, max_size=None, proxy=None, ping_interval=None
        )
        self.socket = self.manager.__enter__()
        self.socket.recv(timeout=20)

    def fields(self) -> dict[str, Any]:
        names = {"observation/image": IMAGE, "observation/wrist_image": IMAGE + 1}
        fields = {**names, "observation/state": np.zeros(8)}
        return {**{k: self.array(v) for k, v in fields.items()}, "prompt": "push"}

    def array(self, array: Any) -> Any:
        return msgpack_numpy.pack_array(array)

    def encode(self, fields: dict[str, Any]) -> bytes:
        return msgpack.packb(fields)

    def send(self, body: bytes) -> str | None:
        self.socket.send(body)
        try:
            reply = self.socket.recv(timeout=20)
        except ConnectionClosed as closed:
            assert closed.rcvd is not None and closed.rcvd.code in (1009, 1013)
            reply = closed.rcvd.reason
        if isinstance(reply, bytes):
            assert msgpack_numpy.unpackb(reply)["actions"].shape == (4, 7)
            return None
        assert reply and "PolicyFailure" not in reply
        self.manager.__exit__(None, None, None)
        self.connect()
        return reply

    def upstream(self, body: bytes) -> list[Any]:
        return leaves(msgpack.unpackb(body, object_hook=readable(msgpack_numpy.unpack_array)))

    def close(self) -> None:
        self.manager.__exit__(None, None, None)


class Gr00tWire:
    def __init__(self, _: str, port: int) -> None:
        self.client = Gr00tClient(port)

    def fields(self) -> dict[str, Any]:
        images = {"front": self.array(IMAGE), "hand": self.array(IMAGE + 1)}
        state = {"state": self.array(np.zeros(8))}
        return {"video": images, "state": state, "language": {"task": [["push"]]}}

    def array(self, array: Any) -> Any:
        return npy(array[None, None])

    def encode(self, fields: dict[str, Any]) -> bytes:
        return msgpack.packb({"endpoint": "get_action", "data": {"observation": fields}})

    def send(self, body: bytes) -> str | None:
        reply = self.client.send(body)
        if isinstance(reply, list):
            (actions,) = reply[0].values()
            assert actions.shape == (1, 4, 7)
            return None
        if "error" not in reply:  # a mutated endpoint that is another one
            return "no action was asked for"
        assert reply["error"] and "PolicyFailure" not in reply["error"]
        return str(reply["error"])

    def upstream(self, body: bytes) -> list[Any]:
        found = leaves(msgpack.unpackb(body, object_hook=readable(from_npy)))
        return [*found, *(a[0, 0] for a in found if isinstance(a, np.ndarray) and a.ndim > 2)]

    def close(self) -> None:
        self.client.__exit__()


class HarnessWire(VlaEvalWire):
    def upstream(self, body: bytes) -> list[Any]:
        return leaves(msgpack.unpackb(body, object_hook=readable(from_tagged)))


WIRES = {"act": ActWire, "openpi": OpenpiWire, "gr00t": Gr00tWire, "vla-eval": HarnessWire}
