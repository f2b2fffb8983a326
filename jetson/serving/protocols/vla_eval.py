"""The websocket protocol of AI2's harness `vla-eval`, as its own model servers speak it.

The client speaks first. A message is a msgpack map {"type", "payload", "seq", "timestamp"}; arrays
and pictures are those of `serving.arrays.decode_tagged`.

    hello          answered with a hello: what benchmarks should send to this policy
    episode_start  what is left of a chunk is dropped; no answer
    observation    {"images": {camera: [h, w, 3]}, "task_description", "state" or "states"};
                   answered under its seq with an action {"actions": float32 [dim]}
    episode_end, error                                        no answer

Benchmarks execute one action an observation, so a chunk is handed out by one, and the policy looks
again when `execute` of it are gone; pictures in between are not decoded. In the harness's live mode
observations come on while the policy thinks: each is answered, in order, so that a chunk that
comes late catches up with the clock. An observation without an action is answered with an error,
and the connection stays; what is no message at all, or comes too often, closes it.

Source: vla-eval 0.8.0 `protocol/`, `connection.py`, `model_servers/`, read as a description.
"""

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from jetson.errors import WireError, forget_frames
from jetson.serving.arrays import decode_tagged, encode_tagged
from jetson.serving.fields import observation_of
from jetson.serving.message_pack import pack, unpack_map
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.request_queue import RequestQueue
from jetson.serving.security import RateLimit
from jetson.serving.structure import VLA_EVAL_LIMITS
from jetson.serving.websocket import WebsocketConnection, closing_code
from qvla_export.shared.action import ActionChunk, Gripper, with_gripper
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.json_documents import brief
from qvla_export.shared.observation import Observation

_LOG = logging.getLogger(__name__)
# Where the harness's configuration says ws://HOST:PORT.
PATH = "/vla-eval"
PROTOCOL_VERSION = 1
_TYPES = ("hello", "episode_start", "observation", "episode_end", "error")
_RENAMED = {"task_description": "instruction", "states": "state"}
_GRIPPERS: tuple[Gripper, ...] = get_args(Gripper)
# Actions leave the service as these numbers; messages are made of them one by one.
_NUMBERS = np.dtype("<f4")

Actions = deque[NDArray[np.float32]]


@dataclass(frozen=True)
class VlaEvalOptions:
    """What a client says behind the path, as `/vla-eval?execute=4&gripper=robosuite`."""

    # Actions of a chunk that are handed out before the policy looks again; 0 for all of them.
    execute: int = 0
    gripper: Gripper = "as-is"

    @classmethod
    def parse(cls, query: str) -> "VlaEvalOptions":
        """Read the query of a URL.

        Raises:
            WireError: an option is unknown, there twice or out of range.
        """
        try:
            pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=4)
        except ValueError:
            pairs = [("", "")] * 4
        options = dict(pairs)
        execute, gripper = options.pop("execute", "0"), options.pop("gripper", "as-is")
        grippers = [name for name in _GRIPPERS if name == gripper]
        twice = len({name for name, _ in pairs}) != len(pairs)
        if options or twice or not _is_count(execute) or not grippers:
            raise WireError(
                f"{PATH} takes execute=NUMBER (of a chunk's actions, before the policy looks "
                f"again) and gripper={'|'.join(_GRIPPERS)}, each once, got {brief(query)}"
            )
        return cls(int(execute), grippers[0])


def _is_count(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 4


@dataclass(frozen=True)
class VlaEvalRequest:
    """One decoded observation."""

    observation: Observation

    def encode(self, chunk: ActionChunk, infer_ms: float) -> bytes:
        """Return the chunk's numbers alone; the endpoint hands them out action by action."""
        return chunk.actions.astype(_NUMBERS).tobytes()


def decode_observation(payload: Mapping[Any, Any], contract: PolicyContract) -> VlaEvalRequest:
    """Return the observation in a message's payload.

    Raises:
        WireError: a field or an array is damaged.
        InvalidObservation: it does not fit the policy.
    """
    images = payload.get("images", {})
    if not isinstance(images, dict):
        raise WireError(f"'images' must be a map of cameras, got {type(images).__name__}")
    fields: dict[str, Any] = {}
    for key, value in [*payload.items(), *images.items()]:
        if not isinstance(key, str):
            raise WireError(f"field names must be text, got {brief(key)}")
        # What the server's --state-fields name is looked for by that name.
        is_piece = key in contract.field_names.state_fields
        name = key if is_piece else _RENAMED.get(key, key)
        if name in fields:
            raise WireError(f"{brief(key)} is there twice; send it once")
        fields[name] = value
    fields.pop("images", None)
    observation, _ = observation_of(fields, contract, decode_tagged)
    return VlaEvalRequest(observation)


@dataclass(frozen=True)
class _Message:
    """What a client says."""

    type: str
    payload: Mapping[Any, Any]
    # The client's own count, told back with the answer.
    seq: int

    @classmethod
    def unpack(cls, body: bytes | bytearray | str) -> "_Message":
        if isinstance(body, str):
            raise WireError("a message is binary msgpack, got text")
        message = unpack_map(body, VLA_EVAL_LIMITS)
        kind, payload, seq = (message.get(name) for name in ("type", "payload", "seq"))
        if kind not in _TYPES or not isinstance(payload, dict) or type(seq) is not int:
            raise WireError(
                f"a message is a map of type ({', '.join(_TYPES)}), payload (a map) and seq (a "
                f"number), got {brief(kind)}, {type(payload).__name__} and {brief(seq)}"
            )
        return cls(kind, payload, seq)


class VlaEvalEndpoint:
    """Serves the harness's clients, each on its own thread."""

    def __init__(self, queue: RequestQueue, rate: RateLimit, options: VlaEvalOptions) -> None:
        self._queue = queue
        self._rate = rate
        self._options = options

    def serve(self, connection: WebsocketConnection, peer: str) -> None:
        """Serve one client until it leaves or says what is no message.

        Raises:
            ConnectionOver: the client left.
        """
        # Of the chunk that is being executed, what is left.
        actions: Actions = deque()
        while True:
            try:
                self._hear(connection, peer, actions)
            except QvlaError as error:
                connection.send(_refusal(error, 0, peer))
                connection.close(closing_code(error), type(error).__name__)
                return

    def _hear(self, connection: WebsocketConnection, peer: str, actions: Actions) -> None:
        """Take the next message and answer it."""
        reply = self._answer(connection, peer, actions)
        # Nothing waits for a client that does not read: no place, none of what it sent.
        if reply is not None:
            connection.send(reply)

    def _answer(self, connection: WebsocketConnection, peer: str, actions: Actions) -> bytes | None:
        """Return the answer to the next message, of which only actions are kept; None for none."""
        body = connection.receive()
        self._rate.take(peer)
        message = _Message.unpack(body)
        if message.type == "hello":
            return _packed("hello", self._hello(message.payload), message.seq)
        if message.type == "episode_start":
            actions.clear()
        if message.type != "observation":
            return None
        try:
            with self._queue.place():
                if not actions:
                    actions.extend(self._act(connection, message.payload))
        except QvlaError as error:
            return _refusal(error, message.seq, peer)
        return _packed("action", {"actions": encode_tagged(actions.popleft())}, message.seq)

    def _act(
        self, connection: WebsocketConnection, payload: Mapping[Any, Any]
    ) -> NDArray[np.float32]:
        """Let the policy look; return what is executed of its chunk, float32 [execute, dim]."""
        service = self._queue.service
        answer = service.answer(payload, decode_observation, lambda: not connection.is_gone)
        if answer.error is not None:
            raise answer.error
        numbers = np.frombuffer(answer.body, _NUMBERS).reshape(-1, service.contract.action_dim)
        chunk = numbers[: self._options.execute or None]
        return with_gripper(chunk, self._options.gripper)

    def _hello(self, greeting: Mapping[Any, Any]) -> dict[str, Any]:
        version = greeting.get("protocol_version", PROTOCOL_VERSION)
        if version != PROTOCOL_VERSION:
            raise WireError(
                f"this server speaks version {PROTOCOL_VERSION} of vla-eval's protocol, the client "
                f"{brief(version)}; use vla-eval 0.8"
            )
        contract = self._queue.service.contract
        # The harness gives these to benchmarks that know them.
        needs = {
            "send_wrist_image": len(contract.cameras) > 1,
            "send_state": contract.state_dim > 0,
        }
        return {
            "harness_version": "qvla serve",
            "protocol_version": PROTOCOL_VERSION,
            "model_server": f"qvla {contract.unnorm_key}",
            "capabilities": {},
            "observation_params": {name: True for name, is_needed in needs.items() if is_needed},
        }


def _packed(kind: str, payload: Mapping[str, Any], seq: int) -> bytes:
    return pack({"type": kind, "payload": payload, "seq": seq, "timestamp": time.time()})


def _refusal(error: QvlaError, seq: int, peer: str) -> bytes:
    """Return the message that says why there is no action, and let go of what the error holds."""
    _LOG.warning("no action for %s: %s", peer, error)
    forget_frames(error)
    return _packed("error", {"error": f"{type(error).__name__}: {error}"}, seq)
