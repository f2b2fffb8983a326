"""Clients of every protocol the server speaks, one connection each: to measure it from outside.

They send and read what the published clients do: OpenVLA-OFT's POST /act, openpi-client's
websocket messages, GR00T's ZMQ requests. A connection that failed is made anew by the next ask.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np
import zmq
from numpy.typing import NDArray
from websockets.exceptions import InvalidStatus, WebSocketException
from websockets.sync.client import connect

from jetson.clients.http_client import RemotePolicy
from jetson.errors import RemoteError, WireError
from jetson.serving.arrays import decode_npy, decode_packed, encode_npy, encode_packed
from jetson.serving.message_pack import pack, unpack_map, unpack_message
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.security import client_tls
from jetson.serving.structure import REPLY_LIMITS
from qvla_export.shared.observation import Observation

ProtocolName = Literal["act", "openpi", "gr00t"]


class ProtocolClient(Protocol):
    """One connection to a server."""

    def ask(self, observation: Observation) -> NDArray[np.float32]:
        """Return the actions for an observation.  float32 [horizon, dim]

        Raises:
            RemoteError: the server failed, refused or cannot be reached.
            InvalidObservation: the observation does not fit the policy.
        """
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


@dataclass(frozen=True)
class Endpoint:
    """Where a server listens.

    Raises:
        RemoteError: it is not HOST:PORT, or a URL of http or https with a port.
    """

    host: str
    port: int
    encrypted: bool = False

    @classmethod
    def parse(cls, text: str) -> "Endpoint":
        """Read "robot:8000", "[::1]:8000" or "https://robot:8000"."""
        try:
            parts = urlsplit(text if "://" in text else f"http://{text}")
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if not host or not port or parts.scheme not in ("http", "https"):
            raise RemoteError(f"a server is HOST:PORT, or https://HOST:PORT, got {text!r:.100}")
        return cls(host, port, parts.scheme == "https")

    def url(self, scheme: str) -> str:
        """Return the address under a scheme that has an `s` where it is encrypted."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{scheme}{'s' if self.encrypted else ''}://{host}:{self.port}"


def open_client(
    protocol: ProtocolName, endpoint: Endpoint, token: str | None, timeout_s: float
) -> ProtocolClient:
    """Connect.

    Raises:
        RemoteError: nobody answers there, speaks that protocol or accepts the token.
    """
    kinds: Mapping[str, Callable[..., ProtocolClient]] = {
        "act": ActClient,
        "openpi": OpenpiClient,
        "gr00t": Gr00tClient,
    }
    return kinds[protocol](endpoint, token, timeout_s)


class ActClient:
    """`POST /act` over a connection that is kept."""

    def __init__(self, endpoint: Endpoint, token: str | None, timeout_s: float) -> None:
        self._policy = RemotePolicy(endpoint.url("http"), timeout_s, token)
        self.contract = self._policy.contract

    def ask(self, observation: Observation) -> NDArray[np.float32]:
        """Return the actions."""
        return self._policy.infer(observation).actions

    def close(self) -> None:
        """Close the connection."""
        self._policy.close()


class OpenpiClient:
    """openpi's websocket, as `openpi_client.WebsocketClientPolicy` speaks it."""

    def __init__(self, endpoint: Endpoint, token: str | None, timeout_s: float) -> None:
        self._url = endpoint.url("ws")
        self._encrypted = endpoint.encrypted
        self._headers = {} if token is None else {"authorization": f"Api-Key {token}"}
        self._timeout_s = timeout_s
        self._open: Any = None
        # What the server says of itself.
        self.metadata = self._connection()

    def ask(self, observation: Observation) -> NDArray[np.float32]:
        """Return the actions."""
        if self._open is None:
            self._connection()
        try:
            self._socket.send(openpi_request(observation))
            reply = self._socket.recv(timeout=self._timeout_s)
            if isinstance(reply, str):
                raise RemoteError(f"{self._url}: {reply:.500}")
            return _actions(
                decode_packed(unpack_map(reply, REPLY_LIMITS).get("actions"), "actions")
            )
        except (OSError, WebSocketException, WireError) as error:
            self.close()
            raise _failure(self._url, error) from None
        except RemoteError:
            # The server closes after the reason.
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None

    def _connection(self) -> dict[Any, Any]:
        tls = (client_tls() or None) if self._encrypted else None
        try:
            self._open = connect(
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
            )
            self._socket = self._open.__enter__()
            greeting = self._socket.recv(timeout=self._timeout_s)
            return unpack_map(greeting if isinstance(greeting, bytes) else b"", REPLY_LIMITS)
        except InvalidStatus as error:
            self._open = None
            reason = (error.response.body or b"").decode(errors="replace")
            status = error.response.status_code
            raise RemoteError(f"{self._url} answered {status}: {reason:.500}") from None
        except (OSError, WebSocketException, WireError) as error:
            self.close()
            raise _failure(self._url, error) from None


class Gr00tClient:
    """GR00T's ZMQ requests, as its `PolicyClient` sends them."""

    def __init__(self, endpoint: Endpoint, token: str | None, timeout_s: float) -> None:
        if endpoint.encrypted:
            raise RemoteError("GR00T's protocol is not encrypted; give HOST:PORT, tunnel by ssh -L")
        self._url = endpoint.url("tcp")
        self._token = {} if token is None else {"api_token": token}
        self._timeout_ms = max(int(timeout_s * 1000), 1)
        self._context = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        try:
            # Which images and states it takes, by name.
            self.modalities = self._call("get_modality_config", {})
        except RemoteError:
            self.close()
            raise

    def ask(self, observation: Observation) -> NDArray[np.float32]:
        """Return the actions."""
        reply = self._call("get_action", gr00t_data(observation))
        try:
            pieces = {name: piece["as_npy"] for name, piece in reply[0].items()}
            arrays = [decode_npy(piece, name)[0] for name, piece in pieces.items()]
            # In the order of the action's numbers, where they have names of their own.
            actions = np.concatenate(arrays, axis=-1)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError):
            raise RemoteError(f"{self._url} answered something else: {reply!r:.200}") from None
        return _actions(actions)

    def close(self) -> None:
        """Close the connection."""
        self._context.destroy(linger=0)

    def _call(self, endpoint: str, data: Mapping[str, Any]) -> Any:
        if self._socket is None:
            self._socket = self._context.socket(zmq.REQ)
            self._socket.setsockopt(zmq.IPV6, int("[" in self._url))
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.setsockopt(zmq.RCVTIMEO, self._timeout_ms)
            self._socket.setsockopt(zmq.SNDTIMEO, self._timeout_ms)
            self._socket.connect(self._url)
        try:
            self._socket.send(pack({"endpoint": endpoint, "data": data, **self._token}))
            reply = unpack_message(self._socket.recv(), REPLY_LIMITS)
        except (zmq.ZMQError, WireError) as error:
            # A REQ socket whose reply is missing sends nothing more.
            self._socket.close()
            self._socket = None
            if isinstance(error, zmq.Again):
                raise RemoteError(
                    f"{self._url} gave no reply within {self._timeout_ms / 1000:g} s; is a "
                    "`qvla serve --gr00t-port` there?"
                ) from None
            raise _failure(self._url, error) from None
        if isinstance(reply, dict) and "error" in reply:
            raise RemoteError(f"{self._url}: {reply['error']!s:.500}")
        return reply


def openpi_request(observation: Observation) -> bytes:
    """Return an observation as a message of openpi's client."""
    fields: dict[str, Any] = {
        f"observation/{name}": encode_packed(image) for name, image in observation.images.items()
    }
    fields["observation/state"] = encode_packed(observation.state)
    return pack({**fields, "prompt": observation.instruction})


def gr00t_data(observation: Observation) -> dict[str, Any]:
    """Return an observation as the data of GR00T's `get_action`."""
    images = observation.images.items()
    seen: dict[str, Any] = {
        "video": {name: _npy(image[None, None]) for name, image in images},
        "language": {"instruction": [[observation.instruction]]},
    }
    if observation.state.size:
        seen["state"] = {"state": _npy(observation.state[None, None])}
    return {"observation": seen, "options": None}


def contract_of_client(client: ProtocolClient) -> PolicyContract | None:
    """Return what the server said its policy takes; None where its protocol does not say all.

    GR00T's names cameras but no lengths of states, openpi's is free to say nothing.
    """
    if isinstance(client, ActClient):
        return client.contract
    if isinstance(client, OpenpiClient):
        try:
            return PolicyContract.from_json(client.metadata)
        except WireError:
            return None
    return None


def _npy(array: NDArray[Any]) -> dict[str, Any]:
    return {"__ndarray_class__": True, "as_npy": encode_npy(array)}


def _actions(array: NDArray[Any]) -> NDArray[np.float32]:
    if array.ndim != 2 or not np.isfinite(array).all():
        raise RemoteError(f"actions must be finite [horizon, dim], got {list(array.shape)}")
    return array.astype(np.float32, copy=False)


def _failure(url: str, error: Exception) -> RemoteError:
    reason = str(error) or "no reply in time"
    return RemoteError(f"{url} failed: {type(error).__name__}: {reason:.300}")
