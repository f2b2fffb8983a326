"""Clients of what is spoken over websockets: openpi's protocol, and that of `vla-eval`."""

import itertools
import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from jetson.clients.endpoint import Endpoint, checked_actions, failure
from jetson.errors import RemoteError, WireError
from jetson.serving.arrays import decode_packed, decode_tagged, encode_packed, encode_tagged
from jetson.serving.message_pack import pack, unpack_map
from jetson.serving.security import client_tls
from jetson.serving.structure import REPLY_LIMITS
from qvla_export.shared.observation import Observation

# The policy looks at every observation, of whose chunk the first action is executed.
VLA_EVAL_PATH = "/vla-eval?execute=1"


class WebsocketClient(ABC):
    """A websocket; one that failed is opened anew by the next request."""

    def __init__(self, endpoint: Endpoint, path: str, token: str | None, timeout_s: float) -> None:
        self._url = f"{endpoint.url('ws')}{path}"
        self._encrypted = endpoint.encrypted
        self._headers = {} if token is None else {"authorization": f"Api-Key {token}"}
        self._timeout_s = timeout_s
        self._socket: ClientConnection | None = None
        try:
            self._connect()
        except (OSError, WebSocketException, WireError) as error:
            self.close()
            raise self._reason(error) from None

    def ask(self, observation: Observation) -> NDArray[np.float32]:
        """Return the actions."""
        try:
            return checked_actions(self._answer(self._socket or self._connect(), observation))
        except (OSError, WebSocketException, WireError) as error:
            self.close()
            raise self._reason(error) from None

    def close(self) -> None:
        """Close the connection."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    @abstractmethod
    def _greet(self, socket: ClientConnection) -> None:
        """Say and hear what comes first."""

    @abstractmethod
    def _answer(self, socket: ClientConnection, observation: Observation) -> NDArray[Any]:
        """Return the actions for an observation, unchecked."""

    def _connect(self) -> ClientConnection:
        tls = (client_tls() or None) if self._encrypted else None
        self._socket = connect(
            self._url,
            compression=None,
            max_size=None,
            proxy=None,
            ssl=tls,
            additional_headers=self._headers,
            open_timeout=self._timeout_s,
            close_timeout=1,
            # From threads that draw random numbers of their own; TCP notices the vanished.
            ping_interval=None,
        ).__enter__()  # as websockets wants it; `close` is what leaving does
        self._greet(self._socket)
        return self._socket

    def _receive(self, socket: ClientConnection) -> dict[Any, Any]:
        """Return the next message.

        Raises:
            RemoteError: it is a text, as which openpi's servers give a reason before they close.
        """
        message = socket.recv(timeout=self._timeout_s)
        if isinstance(message, str):
            self.close()
            raise RemoteError(f"{self._url}: {message:.500}")
        return unpack_map(message, REPLY_LIMITS)

    def _reason(self, error: Exception) -> RemoteError:
        if not isinstance(error, InvalidStatus):
            return failure(self._url, error)
        reason = (error.response.body or b"").decode(errors="replace")
        return RemoteError(f"{self._url} answered {error.response.status_code}: {reason:.500}")


class OpenpiClient(WebsocketClient):
    """openpi's websocket, as `openpi_client.WebsocketClientPolicy` speaks it."""

    # What the server says of itself.
    metadata: dict[Any, Any]

    def __init__(self, endpoint: Endpoint, token: str | None, timeout_s: float) -> None:
        super().__init__(endpoint, "", token, timeout_s)

    def _greet(self, socket: ClientConnection) -> None:
        self.metadata = self._receive(socket)

    def _answer(self, socket: ClientConnection, observation: Observation) -> NDArray[Any]:
        socket.send(openpi_request(observation))
        return decode_packed(self._receive(socket).get("actions"), "actions")


class VlaEvalClient(WebsocketClient):
    """vla-eval's websocket, as its benchmarks speak it; the policy looks at every observation.

    The protocol hands actions out one by one, so that an answer is a chunk's first: [1, dim].
    """

    def __init__(self, endpoint: Endpoint, token: str | None, timeout_s: float) -> None:
        self._seqs = itertools.count(1)
        super().__init__(endpoint, VLA_EVAL_PATH, token, timeout_s)

    def _greet(self, socket: ClientConnection) -> None:
        hello = {"harness_version": "qvla load", "protocol_version": 1}
        self._exchange(socket, "hello", hello)

    def _answer(self, socket: ClientConnection, observation: Observation) -> NDArray[Any]:
        seen = vla_eval_payload(observation)
        action = self._exchange(socket, "observation", seen).get("actions")
        return decode_tagged(action, "actions")[None]

    def _exchange(self, socket: ClientConnection, kind: str, payload: Any) -> dict[Any, Any]:
        """Send a message; return the payload of its answer."""
        seq = next(self._seqs)
        socket.send(vla_eval_message(kind, payload, seq))
        reply = self._receive(socket)
        answer = reply.get("payload")
        if not isinstance(answer, dict) or "error" in answer or reply.get("seq") != seq:
            # A refused observation leaves the connection open, what was no message does not.
            if reply.get("seq") != seq:
                self.close()
            raise RemoteError(f"{self._url}: {_error_of(answer):.500}")
        return answer


def openpi_request(observation: Observation) -> bytes:
    """Return an observation as a message of openpi's client."""
    fields: dict[str, Any] = {
        f"observation/{name}": encode_packed(image) for name, image in observation.images.items()
    }
    fields["observation/state"] = encode_packed(observation.state)
    return pack({**fields, "prompt": observation.instruction})


def vla_eval_payload(observation: Observation) -> dict[str, Any]:
    """Return an observation as the payload of vla-eval's message."""
    images = {name: encode_tagged(image) for name, image in observation.images.items()}
    state = encode_tagged(observation.state)
    return {"images": images, "state": state, "task_description": observation.instruction}


def vla_eval_message(kind: str, payload: Any, seq: int) -> bytes:
    """Return a message of vla-eval's client."""
    return pack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})


def _error_of(answer: object) -> str:
    return str(answer["error"] if isinstance(answer, dict) and "error" in answer else answer)
