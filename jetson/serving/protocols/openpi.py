"""openpi's websocket protocol, as `openpi_client.WebsocketClientPolicy` speaks it.

The server speaks first: its metadata. Then each binary message is an observation and each reply
its actions, msgpack both; a text message is the reason of a failure, after which the server
closes with 1011, as openpi's clients expect. Arrays are those of `serving.arrays.decode_packed`.

    observation  {"observation/image", "observation/wrist_image", "observation/state", "prompt"}
                 or {"images": {camera: [3, h, w] or [h, w, 3]}, "state", "prompt"}; cameras also
                 by the policy's own names
    reply        {"actions": float32 [horizon, dim], "policy_timing": {"infer_ms", ...},
                  "server_timing": {"infer_ms", "prev_total_ms" from the second reply on}}

Source: openpi `serving/websocket_policy_server.py` and the published openpi-client 0.1.2.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.errors import WireError, forget_frames
from jetson.serving.arrays import decode_packed, encode_packed
from jetson.serving.fields import observation_of
from jetson.serving.message_pack import pack, unpack_map
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.request_queue import RequestQueue
from jetson.serving.security import RateLimit
from jetson.serving.structure import OPENPI_LIMITS
from jetson.serving.websocket import WebsocketConnection, closing_code
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.json_documents import brief
from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)
_PREFIX = "observation/"
_RENAMED = {"prompt": "instruction"}


@dataclass(frozen=True)
class OpenpiRequest:
    """One decoded observation, and how long the reply before it took."""

    observation: Observation
    # None before the first reply of a connection.
    prev_total_ms: float | None

    def encode(self, chunk: ActionChunk, infer_ms: float) -> bytes:
        """Return the reply with its timings."""
        server_timing = {"infer_ms": infer_ms}
        if self.prev_total_ms is not None:
            server_timing["prev_total_ms"] = self.prev_total_ms
        spans = {f"{name}_ms": ms for name, ms in chunk.timing_ms.items()}
        return pack(
            {
                "actions": encode_packed(chunk.actions),
                "policy_timing": {**spans, "infer_ms": infer_ms},
                "server_timing": server_timing,
            }
        )


def decode_observation(
    body: bytes | bytearray, contract: PolicyContract, prev_total_ms: float | None = None
) -> OpenpiRequest:
    """Return the observation in a message.

    Raises:
        WireError: the message or an array in it is damaged.
        InvalidObservation: it does not fit the policy.
    """
    observation, _ = observation_of(_fields(unpack_map(body, OPENPI_LIMITS)), contract, _array)
    return OpenpiRequest(observation, prev_total_ms)


class OpenpiEndpoint:
    """Serves websocket clients, each on its own thread."""

    def __init__(self, queue: RequestQueue, rate: RateLimit) -> None:
        self._queue = queue
        self._rate = rate
        self._metadata = pack(queue.service.contract.to_json())

    def serve(self, connection: WebsocketConnection, peer: str) -> None:
        """Serve one client until it leaves or a request of its fails.

        Raises:
            ConnectionOver: the client left.
        """
        connection.send(self._metadata)
        prev_total_ms: float | None = None
        while True:
            try:
                prev_total_ms = self._answer(connection, peer, prev_total_ms)
            except QvlaError as error:
                _LOG.warning("no action for %s: %s", peer, error)
                connection.send(f"{type(error).__name__}: {error}")
                forget_frames(error)
                connection.close(closing_code(error), type(error).__name__)
                return

    def _answer(
        self, connection: WebsocketConnection, peer: str, prev_total_ms: float | None
    ) -> float:
        """Answer the next message; return the milliseconds it took."""
        start_ns, reply = self._act(connection, peer, prev_total_ms)
        # Nothing waits for a client that does not read: no place, none of what it sent.
        connection.send(reply)
        return (time.perf_counter_ns() - start_ns) / 1e6

    def _act(
        self, connection: WebsocketConnection, peer: str, prev_total_ms: float | None
    ) -> tuple[int, bytes]:
        """Return when the next message was there, and its reply."""
        body = connection.receive()
        start_ns = time.perf_counter_ns()
        if isinstance(body, str):
            raise WireError("an observation is a binary msgpack message, got text")
        self._rate.take(peer)
        with self._queue.place():
            decode = partial(decode_observation, prev_total_ms=prev_total_ms)
            answer = self._queue.service.answer(body, decode, lambda: not connection.is_gone)
        if answer.error is not None:
            raise answer.error
        return start_ns, answer.body


def _fields(message: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the message by the names of `jetson.serving.fields`, which every dialect shares."""
    fields: dict[str, Any] = {}
    images = message.get("images", {})
    if not isinstance(images, dict):
        raise WireError(f"'images' must be a map of cameras, got {type(images).__name__}")
    for given, value in [*message.items(), *images.items()]:
        if not isinstance(given, str):
            raise WireError(f"field names must be text, got {brief(given)}")
        name = given.removeprefix(_PREFIX)
        name = _RENAMED.get(name, name)
        if name in fields:
            raise WireError(f"{brief(given)} is there twice; send it once")
        fields[name] = value
    fields.pop("images", None)
    return fields


def _array(value: Any, name: str) -> NDArray[Any]:
    array = decode_packed(value, name)
    # ALOHA's clients send their images channel first, which no image [h, w, 3 or 4] looks like.
    if array.ndim == 3 and array.shape[0] == 3 and min(array.shape[1:]) > 4:
        return np.ascontiguousarray(array.transpose(1, 2, 0))
    return array
