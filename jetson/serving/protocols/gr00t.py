"""GR00T's ZMQ protocol: one msgpack map a request, one reply each, arrays as the bytes of np.save.

    request  {"endpoint", "data": {...}, "api_token"?}; endpoints get_action (the default), ping,
             reset, get_modality_config; kill is refused, a robot's server is not a client's to end
    data     an observation, in one of three forms: `gr00t_messages`
    reply    the actions, or {"error": reason}, of a busy server also "retry_after_s"

Clients are REQ sockets; the server is a ROUTER, so that one which leaves blocks nobody.
Source: Isaac-GR00T `gr00t/policy/server_client.py` (N1.6, N1.7) and `gr00t/eval/service.py` (N1.5),
read as a description.
"""

import logging
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zmq

from jetson.errors import (
    RETRY_AFTER_S,
    Forbidden,
    RateLimited,
    RefusedSetting,
    ServerBusy,
    WireError,
    forget_frames,
)
from jetson.server_settings import ServerSettings
from jetson.serving.byte_budget import ByteBudget
from jetson.serving.connections import client_places
from jetson.serving.message_pack import pack, text_field, unpack_map
from jetson.serving.protocols.gr00t_messages import decode_observation, modality_config
from jetson.serving.protocols.zmtp_relay import RelayLimits, ZmtpRelay
from jetson.serving.request_queue import RequestQueue
from jetson.serving.security import RateLimit, check_token
from jetson.serving.structure import GR00T_LIMITS
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.json_documents import brief

_LOG = logging.getLogger(__name__)
ENDPOINTS = ("get_action", "ping", "reset", "get_modality_config")
# How often the thread looks whether it should end; requests do not wait for it.
_POLL_MS = 100


class Gr00tEndpoint:
    """Serves ZMQ clients on a thread of its own. A context manager; the port is open inside."""

    def __init__(
        self, queue: RequestQueue, settings: ServerSettings, rate: RateLimit, budget: ByteBudget
    ) -> None:
        self._queue = queue
        self._settings = settings
        connections = client_places(settings.max_connections, "ZMQ clients")
        self._limits = RelayLimits(
            settings.max_body_bytes, connections, budget, rate, queue.service.require_alive
        )
        self._ending = threading.Event()
        self._modalities = modality_config(queue.service.contract)
        self._thread = threading.Thread(target=self._serve, name="qvla-gr00t", daemon=True)

    def __enter__(self) -> "Gr00tEndpoint":
        settings = self._settings
        assert settings.gr00t_port is not None
        # Only this user can reach what is in it.
        self._folder = tempfile.TemporaryDirectory(prefix="qvla-zmq-")
        behind = Path(self._folder.name) / "socket"
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        options = {
            zmq.LINGER: 1000,
            zmq.MAXMSGSIZE: settings.max_body_bytes,
            zmq.RCVHWM: settings.max_pending,
            zmq.SNDHWM: settings.max_pending,
            # A peer that vanished is forgotten, as its memory would not be.
            zmq.HEARTBEAT_IVL: 10_000,
            zmq.HEARTBEAT_TIMEOUT: 30_000,
        }
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._socket.bind(f"ipc://{behind}")
        host, port = settings.host or "0.0.0.0", settings.gr00t_port
        try:
            self._relay = ZmtpRelay(host, port, behind, self._limits, _refusal).__enter__()
        except OSError as error:
            self._context.destroy(linger=0)
            self._folder.cleanup()
            raise RefusedSetting(
                f"cannot listen on {host}:{port}: {error}; stop what uses it or choose another "
                "--gr00t-port"
            ) from None
        self._queue.on_stuck.append(self._relay.give_up)
        _LOG.info("serving GR00T's protocol on %s:%d", host, port)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ending.set()
        self._thread.join()
        self._socket.close()
        self._context.term()
        self._relay.__exit__(None, None, None)
        self._folder.cleanup()

    def _serve(self) -> None:
        # Once it should end, what has arrived is still answered: with the reason, mostly.
        while self._socket.poll(0 if self._ending.is_set() else _POLL_MS) or (
            not self._ending.is_set()
        ):
            self._serve_one()

    def _serve_one(self) -> None:
        """Answer a message, if there is one, and keep nothing of it."""
        try:
            frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
        except zmq.Again:
            return
        if len(frames) != 3 or len(frames[1]):
            _LOG.warning("a ZMQ peer sent %d parts, a REQ socket sends 3", len(frames))
            return
        name = frames[0].bytes
        reply = self._answer(frames[2], lambda: not self._relay.is_gone(name))
        self._socket.send_multipart([name, b"", reply])

    def _answer(self, frame: zmq.Frame, wanted: Callable[[], bool]) -> bytes:
        try:
            # Who has no token makes the server unpack nothing.
            token = text_field(frame.buffer, "api_token", GR00T_LIMITS)
            check_token(token, self._settings.token)
            return self._dispatch(unpack_map(frame.bytes, GR00T_LIMITS), wanted)
        except QvlaError as error:
            reply = _refusal(error)
            forget_frames(error)
            return reply
        except Exception as error:  # the one thread that serves all ZMQ clients does not end
            _LOG.exception("a failure of the server's own")
            return pack({"error": f"the server failed: {type(error).__name__}"})

    def _dispatch(self, message: Mapping[Any, Any], wanted: Callable[[], bool]) -> bytes:
        endpoint = message.get("endpoint", "get_action")
        if endpoint == "get_action":
            with self._queue.place():
                answer = self._queue.service.answer(message, decode_observation, wanted)
            if answer.error is not None:
                raise answer.error
            return answer.body
        if endpoint == "ping":
            return pack({"status": "ok", "message": "Server is running"})
        if endpoint == "reset":
            return pack({})  # a policy keeps nothing between observations
        if endpoint == "get_modality_config":
            return pack(self._modalities)
        if endpoint == "kill":
            raise Forbidden("clients may not stop this server; send it SIGTERM on the robot")
        raise WireError(f"endpoint must be one of {list(ENDPOINTS)}, got {brief(endpoint)}")


def _refusal(error: QvlaError) -> bytes:
    """Return the reply that says why there is no action."""
    _LOG.warning("no action: %s", error)
    reply: dict[str, Any] = {"error": f"{type(error).__name__}: {error}"}
    if isinstance(error, ServerBusy | RateLimited):
        reply["retry_after_s"] = RETRY_AFTER_S
    return pack(reply)
