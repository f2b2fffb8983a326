"""GR00T's ZMQ protocol: one msgpack map a request, one reply each, arrays as the bytes of np.save.

    request  {"endpoint", "data": {...}, "api_token"?}; endpoints get_action (the default), ping,
             reset, get_modality_config; kill is refused, a robot's server is not a client's to end
    data     {"observation": {"video": {camera: uint8 [1, 1, h, w, 3]},
                              "state": {"state": float [1, 1, n]},
                              "language": {any one key: [[instruction]]}}, "options"}
             or the same keys flat: "video.<camera>", "state.<name>", and any other for language;
             N1.5's clients send the flat keys as "data" itself, with time alone in front
    reply    [{"actions": float32 [1, horizon, dim]}, {"timing_ms": ...}], flat "action.actions";
             to N1.5 {"action.actions": float32 [horizon, dim]}; or {"error": reason}

Clients are REQ sockets; the server is a ROUTER, so that one which leaves blocks nobody.
Sources: Isaac-GR00T `gr00t/policy/server_client.py` and `gr00t_policy.py` (N1.6, N1.7) and
`gr00t/eval/service.py` (N1.5), read as a description.
"""

import logging
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import zmq
from numpy.typing import NDArray

from jetson.errors import Forbidden, RefusedSetting, WireError
from jetson.server_settings import ServerSettings
from jetson.serving.arrays import decode_npy, encode_npy
from jetson.serving.byte_budget import ByteBudget
from jetson.serving.connections import Connections
from jetson.serving.fields import observation_of
from jetson.serving.message_pack import pack, text_field, unpack_map
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.protocols.zmtp_relay import RelayLimits, ZmtpRelay
from jetson.serving.request_queue import RequestQueue
from jetson.serving.security import RateLimit, check_token
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import InvalidObservation, QvlaError
from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)
ENDPOINTS = ("get_action", "ping", "reset", "get_modality_config")
# How often the thread looks whether it should end; requests do not wait for it.
_POLL_MS = 100


@dataclass(frozen=True)
class Gr00tRequest:
    """One decoded observation, and the form of its keys."""

    observation: Observation
    form: Literal["nested", "flat", "n1.5"]

    def encode(self, chunk: ActionChunk, infer_ms: float) -> bytes:
        """Return the reply: [action, info], or for N1.5 the action alone."""
        if self.form == "n1.5":
            return pack({"action.actions": _npy(chunk.actions)})
        actions = _npy(chunk.actions[None])
        info = {"timing_ms": {**chunk.timing_ms, "infer": infer_ms}}
        return pack([{"action.actions" if self.form == "flat" else "actions": actions}, info])


def decode_observation(message: Mapping[Any, Any], contract: PolicyContract) -> Gr00tRequest:
    """Return the observation of a `get_action` message.

    Raises:
        WireError: the message or an array in it is damaged.
        InvalidObservation: it does not fit the policy.
    """
    data = _map(message.get("data"), "data")
    if "observation" not in data and any(str(key).startswith("video.") for key in data):
        fields = _fields(_nest(data), contract)
        observation, _ = observation_of(fields, contract, _timed_array)
        return Gr00tRequest(observation, "n1.5")
    entries = _map(data.get("observation"), "observation")
    nested = "video" in entries
    fields = _fields(entries if nested else _nest(entries), contract)
    observation, _ = observation_of(fields, contract, _array)
    return Gr00tRequest(observation, "nested" if nested else "flat")


def modality_config(contract: PolicyContract) -> dict[str, Any]:
    """Return what `get_modality_config` answers: the keys and steps a client sends and gets."""
    states = list(contract.field_names.state_fields) or ["state"]
    keys = {"video": list(contract.cameras), "state": states, "language": ["instruction"]}
    if not contract.state_dim:
        del keys["state"]
    return {
        **{name: _modality([0], names) for name, names in keys.items()},
        "action": _modality(list(range(contract.horizon)), ["actions"]),
    }


class Gr00tEndpoint:
    """Serves ZMQ clients on a thread of its own. A context manager; the port is open inside."""

    def __init__(
        self, queue: RequestQueue, settings: ServerSettings, rate: RateLimit, budget: ByteBudget
    ) -> None:
        self._queue = queue
        self._settings = settings
        connections = Connections(settings.max_connections, settings.max_connections, "ZMQ clients")
        self._limits = RelayLimits(settings.max_body_bytes, connections, budget, rate)
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
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                continue
            if len(frames) != 3 or len(frames[1]):
                _LOG.warning("a ZMQ peer sent %d parts, a REQ socket sends 3", len(frames))
                continue
            reply = self._answer(frames[2])
            self._socket.send_multipart([frames[0].bytes, b"", reply])

    def _answer(self, frame: zmq.Frame) -> bytes:
        try:
            # Who has no token makes the server unpack nothing.
            check_token(text_field(frame.buffer, "api_token"), self._settings.token)
            return self._dispatch(unpack_map(frame.bytes))
        except QvlaError as error:
            return _refusal(error)
        except Exception as error:  # the one thread that serves all ZMQ clients does not end
            _LOG.exception("a failure of the server's own")
            return pack({"error": f"the server failed: {type(error).__name__}"})

    def _dispatch(self, message: Mapping[Any, Any]) -> bytes:
        endpoint = message.get("endpoint", "get_action")
        if endpoint == "get_action":
            with self._queue.place():
                answer = self._queue.service.answer(message, decode_observation)
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
        raise WireError(f"endpoint must be one of {list(ENDPOINTS)}, got {endpoint!r:.80}")


def _refusal(error: QvlaError) -> bytes:
    """Return the reply that says why there is no action."""
    _LOG.warning("no action: %s", error)
    return pack({"error": f"{type(error).__name__}: {error}"})


def _map(value: Any, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise WireError(f"{name!r} must be a map, got {type(value).__name__}")
    return value


def _nest(flat: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    nested: dict[str, dict[str, Any]] = {"video": {}, "state": {}, "language": {}}
    for key, value in flat.items():
        kind, _, name = str(key).partition(".")
        if kind in ("video", "state") and name:
            nested[kind][name] = value
        else:
            nested["language"][str(key)] = value
    return nested


def _fields(observation: Mapping[str, Any], contract: PolicyContract) -> dict[str, Any]:
    """Return the observation by the names of `serving.fields`, batch and time still in front."""
    video = _map(observation.get("video"), "video")
    language = _map(observation.get("language"), "language")
    states = _map(observation.get("state", {}), "state")
    names = [*video, *states]
    if any(not isinstance(name, str) for name in names) or {"state", "instruction"} & {*video}:
        raise WireError(f"cameras must have names of their own, got {list(video)!r:.200}")
    if twice := {*video} & {*states}:
        raise WireError(f"{sorted(twice)} are cameras and states; send each name once")
    if len(language) != 1:
        raise InvalidObservation(
            f"an observation needs one 'language' entry, got {list(language)!r:.200}"
        )
    pieces = contract.field_names.state_fields
    if not {*states} & {*pieces} and states:
        if len(states) > 1 and contract.state_dim:
            known = f"one of {list(pieces)}" if pieces else "qvla serve --state-fields NAME,NAME"
            raise InvalidObservation(
                "several states are put together in the order the server was given; got "
                f"{list(states)!r:.200}. Name them: {known}"
            )
        states = {"state": next(iter(states.values()))}
    (instruction,) = language.values()
    # [[text]]: batch and time; the flat form has no time.
    for _ in range(2):
        if isinstance(instruction, list) and len(instruction) == 1:
            instruction = instruction[0]
    return {**video, **states, "instruction": instruction}


def _array(value: Any, name: str) -> NDArray[Any]:
    array = _stored_array(value, name)
    if array.ndim < 3 or array.shape[:2] != (1, 1):
        raise InvalidObservation(
            f"{name!r} must have batch and time of 1 in front, [1, 1, ...], got {list(array.shape)}"
        )
    observed: NDArray[Any] = array[0, 0]
    return observed


def _timed_array(value: Any, name: str) -> NDArray[Any]:
    """Return an array of N1.5: images [1, h, w, 3], states [1, n], or one more 1 in front."""
    array = _stored_array(value, name)
    leading = array.ndim - (1 if array.ndim <= 3 else 3)
    if leading not in (1, 2) or any(size != 1 for size in array.shape[:leading]):
        raise InvalidObservation(
            f"{name!r} must have a time of 1 in front, [1, ...], got {list(array.shape)}"
        )
    observed: NDArray[Any] = array.reshape(array.shape[leading:])
    return observed


def _stored_array(value: Any, name: str) -> NDArray[Any]:
    if not isinstance(value, dict) or "__ndarray_class__" not in value:
        raise WireError(
            f"{name!r} must be an array as np.save writes it, got {type(value).__name__}"
        )
    return decode_npy(value.get("as_npy"), name)


def _npy(array: NDArray[Any]) -> dict[str, Any]:
    return {"__ndarray_class__": True, "as_npy": encode_npy(array)}


def _modality(steps: list[int], names: list[str]) -> dict[str, Any]:
    config = {
        "delta_indices": steps,
        "modality_keys": names,
        "sin_cos_embedding_keys": None,
        "mean_std_embedding_keys": None,
        "action_configs": None,
    }
    return {"__ModalityConfig_class__": True, "as_json": config}
