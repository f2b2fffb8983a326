"""Clients of every protocol the server speaks, one connection each: to measure it from outside.

They send and read what the published clients do: OpenVLA-OFT's POST /act, openpi-client's and
vla-eval's websocket messages, GR00T's ZMQ requests. A connection that failed is made anew by the
next ask.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import numpy as np
import zmq
from numpy.typing import NDArray

from jetson.clients.endpoint import Endpoint, checked_actions, failure
from jetson.clients.http_client import RemotePolicy
from jetson.clients.websocket_clients import OpenpiClient, VlaEvalClient
from jetson.errors import RemoteError, WireError
from jetson.serving.arrays import decode_npy, encode_npy
from jetson.serving.message_pack import pack, unpack_message
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.structure import REPLY_LIMITS
from qvla_export.shared.observation import Observation

ProtocolName = Literal["act", "openpi", "gr00t", "vla-eval"]


class ProtocolClient(Protocol):
    """One connection to a server."""

    def ask(self, observation: Observation) -> NDArray[np.float32]:
        """Return the actions for an observation, of vla-eval's server the first one alone.

        float32 [horizon, dim]

        Raises:
            RemoteError: the server failed, refused or cannot be reached.
            InvalidObservation: the observation does not fit the policy.
        """
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


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
        "vla-eval": VlaEvalClient,
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
        return checked_actions(actions)

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
            raise failure(self._url, error) from None
        if isinstance(reply, dict) and "error" in reply:
            raise RemoteError(f"{self._url}: {reply['error']!s:.500}")
        return reply


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

    GR00T's names cameras but no lengths of states, vla-eval's neither; openpi's is free to say
    nothing.
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
