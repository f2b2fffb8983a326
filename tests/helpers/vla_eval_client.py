"""What vla-eval's client says and reads, spelled here: the package is not needed for it."""

import io
import itertools
import time
from contextlib import suppress
from typing import Any

import msgpack
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect


def tagged(array: NDArray[Any]) -> dict[str, Any]:
    """Spell an array; `numpy_codec.encode_ndarray` of vla-eval."""
    parts = {"data": array.tobytes(), "dtype": array.dtype.str, "shape": list(array.shape)}
    return {"__ndarray__": True, **parts}


def picture(image: NDArray[np.uint8], form: str = "png", **options: Any) -> dict[str, Any]:
    """Spell a picture; `image_codec.encode_image`, whose default is PNG."""
    if form == "raw":
        return {**tagged(image), "__image__": True, "format": "raw"}
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return {
        "__image__": True,
        "format": form,
        "data": file.getvalue(),
        "shape": list(image.shape),
    }


def from_tagged(value: Any) -> Any:
    """Read what stands for an array; `numpy_codec.decode_ndarray`."""
    if not isinstance(value, dict):
        return value
    if "__image__" in value and value["format"] != "raw":
        return np.array(Image.open(io.BytesIO(value["data"])))
    if "__image__" in value or "__ndarray__" in value:
        return np.frombuffer(value["data"], np.dtype(value["dtype"])).reshape(value["shape"])
    return value


def pack(kind: str, payload: Any, seq: object) -> bytes:
    """Spell a message, right or wrong."""
    message = {"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()}
    packed: bytes = msgpack.packb(message)
    return packed


class VlaEvalClient:
    """One connection, as `vla_eval.connection.Connection` uses it."""

    def __init__(self, url: str, query: str = "") -> None:
        # Without pings: they draw from `random`, which hypothesis wants for itself.
        self._manager = connect(
            f"{url.replace('http', 'ws', 1)}/vla-eval{query}",
            compression=None,
            max_size=None,
            proxy=None,
            ping_interval=None,
        )
        self.socket = self._manager.__enter__()
        self._seqs = itertools.count(1)
        self.server_info = self.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1})

    def send(self, kind: str, payload: Any) -> int:
        seq = next(self._seqs)
        self.socket.send(pack(kind, payload, seq))
        return seq

    def receive(self) -> dict[str, Any]:
        reply = msgpack.unpackb(self.socket.recv(timeout=20), object_hook=from_tagged)
        assert set(reply) == {"type", "payload", "seq", "timestamp"}
        return dict(reply)

    def ask(self, kind: str, payload: Any) -> Any:
        """Send a message and return the payload of its answer, which must be of its seq."""
        seq = self.send(kind, payload)
        reply = self.receive()
        assert reply["seq"] == seq
        return reply["payload"]

    def act(self, payload: Any) -> NDArray[np.float32]:
        """Return the action for an observation."""
        actions: NDArray[np.float32] = self.ask("observation", payload)["actions"]
        return actions

    def close(self) -> None:
        self._manager.__exit__(None, None, None)


class VlaEvalWire:
    """The protocol for `protocol_wires`: a chunk's first action answers every request."""

    def __init__(self, url: str, _: int) -> None:
        self.url = url
        self.client = VlaEvalClient(url)
        # Told back behind a request that is none, so that nobody waits for an answer to it.
        self._marks = itertools.count(1 << 40)

    def fields(self) -> dict[str, Any]:
        image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
        images = {"front": picture(image), "hand": self.array(image + 1)}
        return {"images": images, "state": self.array(np.zeros(8)), "task_description": "push"}

    def array(self, array: Any) -> Any:
        return tagged(array)

    def encode(self, fields: dict[str, Any]) -> bytes:
        return pack("observation", fields, 7)

    def send(self, body: bytes) -> str | None:
        mark = next(self._marks)
        answers: list[dict[str, Any]] = []
        try:
            for message in (pack("episode_start", {}, 1), body, pack("hello", {}, mark)):
                self.client.socket.send(message)
            while not answers or answers[-1]["seq"] != mark:
                answers.append(self.client.receive())
        except ConnectionClosed as closed:
            # The reason may be there already when the mark behind the request cannot be sent.
            with suppress(ConnectionClosed):
                while not answers:
                    answers.append(self.client.receive())
            self.client.close()
            self.client = VlaEvalClient(self.url)
            if not answers:
                assert closed.rcvd is not None and closed.rcvd.code in (1009, 1013)
                return closed.rcvd.reason
        first = answers[0]
        if first["type"] == "action":
            assert first["payload"]["actions"].shape == (7,)
            return None
        if first["type"] == "hello":
            return "no action was asked for"
        assert first["payload"]["error"] and "PolicyFailure" not in first["payload"]["error"]
        return str(first["payload"]["error"])

    def close(self) -> None:
        self.client.close()
