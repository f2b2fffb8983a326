"""openpi's websocket protocol, as `openpi_client.WebsocketClientPolicy` speaks it.

The server speaks first: its metadata. Then each binary message is an observation and each reply
its actions, msgpack both; a text message is the reason of a failure, after which the server
closes with 1011, as openpi's clients expect. Arrays are those of `jetson.arrays.decode_packed`.

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
from starlette.websockets import WebSocket, WebSocketDisconnect

from jetson.arrays import decode_packed, encode_packed
from jetson.contract import PolicyContract
from jetson.errors import ServerBusy, WireError
from jetson.fields import observation_of
from jetson.guard import peer_of
from jetson.packing import pack, unpack_map
from jetson.security import RateLimit
from jetson.settings import ServerSettings
from jetson.worker import ActionWorker
from qvla_export.action import ActionChunk
from qvla_export.errors import QvlaError
from qvla_export.observation import Observation

_LOG = logging.getLogger(__name__)
_PREFIX = "observation/"
_RENAMED = {"prompt": "instruction"}
_INTERNAL_ERROR = 1011


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
        stages = {f"{name}_ms": ms for name, ms in chunk.timing_ms.items()}
        return pack(
            {
                "actions": encode_packed(chunk.actions),
                "policy_timing": {**stages, "infer_ms": infer_ms},
                "server_timing": server_timing,
            }
        )


def decode_observation(
    body: bytes, contract: PolicyContract, prev_total_ms: float | None = None
) -> OpenpiRequest:
    """Return the observation in a message.

    Raises:
        WireError: the message or an array in it is damaged.
        InvalidObservation: it does not fit the policy.
    """
    observation, _ = observation_of(_fields(unpack_map(body)), contract, _array)
    return OpenpiRequest(observation, prev_total_ms)


class OpenpiEndpoint:
    """Serves websocket clients."""

    def __init__(self, worker: ActionWorker, settings: ServerSettings, rate: RateLimit) -> None:
        self._worker = worker
        self._settings = settings
        self._rate = rate
        self._connections = 0
        self._metadata = pack(worker.service.contract.to_json())

    async def serve(self, socket: WebSocket) -> None:
        """Serve one client until it leaves or a request of its fails."""
        await socket.accept()
        self._connections += 1
        try:
            if self._connections > self._settings.max_connections:
                raise ServerBusy(
                    f"{self._settings.max_connections} websocket clients are connected already; "
                    "close one or raise the server's limit"
                )
            await socket.send_bytes(self._metadata)
            await self._answer_all(socket)
        except WebSocketDisconnect:
            _LOG.info("a websocket client left")
        except QvlaError as error:
            await _fail(socket, error)
        finally:
            self._connections -= 1

    async def _answer_all(self, socket: WebSocket) -> None:
        peer = peer_of(socket)
        prev_total_ms: float | None = None
        while True:
            body = await _receive(socket)
            start_ns = time.perf_counter_ns()
            self._rate.take(peer)
            with self._worker.place():
                decode = partial(decode_observation, prev_total_ms=prev_total_ms)
                answer = await self._worker.answer(body, decode)
                if answer.error is not None:
                    raise answer.error
                await socket.send_bytes(answer.body)
            prev_total_ms = (time.perf_counter_ns() - start_ns) / 1e6


async def _receive(socket: WebSocket) -> bytes:
    message = await socket.receive()
    if message["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(message.get("code", 1006))
    body = message.get("bytes")
    if not isinstance(body, bytes):
        raise WireError("an observation is a binary msgpack message, got text")
    return body


async def _fail(socket: WebSocket, error: QvlaError) -> None:
    _LOG.warning("no action: %s", error)
    try:
        await socket.send_text(f"{type(error).__name__}: {error}")
        await socket.close(_INTERNAL_ERROR, type(error).__name__)
    except (WebSocketDisconnect, RuntimeError):
        _LOG.info("a websocket client left before it could be told why")


def _fields(message: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the message by the names of `jetson.fields`, which every dialect shares."""
    fields: dict[str, Any] = {}
    images = message.get("images", {})
    if not isinstance(images, dict):
        raise WireError(f"'images' must be a map of cameras, got {type(images).__name__}")
    for given, value in [*message.items(), *images.items()]:
        if not isinstance(given, str):
            raise WireError(f"field names must be text, got {given!r:.80}")
        name = given.removeprefix(_PREFIX)
        name = _RENAMED.get(name, name)
        if name in fields:
            raise WireError(f"{given!r:.80} is there twice; send it once")
        fields[name] = value
    fields.pop("images", None)
    return fields


def _array(value: Any, name: str) -> NDArray[Any]:
    array = decode_packed(value, name)
    # ALOHA's clients send their images channel first, which no image [h, w, 3 or 4] looks like.
    if array.ndim == 3 and array.shape[0] == 3 and min(array.shape[1:]) > 4:
        return np.ascontiguousarray(array.transpose(1, 2, 0))
    return array
