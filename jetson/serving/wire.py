"""The bodies of `POST /act`: OpenVLA's and OpenVLA-OFT's, told apart by their fields.

    OpenVLA  {"image", "instruction", "unnorm_key"?}        -> one action, float64 [dim]
    OFT      {"full_image" | camera names, "*wrist*",
              "state"?, "instruction"}                      -> list of `horizon` arrays [dim]

A body is OpenVLA's when "image" is the only image and there is no "state"; everything else is
OFT's. OpenVLA's clients expect one action, so a chunk's first action answers them; `reply`
overrides that ("full" adds the normalized actions and is what `clients.http_client` asks for).
Either body may come as `{"encoded": "<JSON text>"}`; then the reply is a JSON string too.
Sources: openvla and openvla-oft `vla-scripts/deploy.py`.
"""

import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from jetson.errors import WireError
from jetson.serving.arrays import decode_array, encode_array
from jetson.serving.fields import observation_of
from jetson.serving.policy_contract import PolicyContract
from jetson.serving.structure import ACT_LIMITS, require_bounded_json
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactError
from qvla_export.shared.json_documents import JsonLimits, brief, parse_document
from qvla_export.shared.observation import Observation

Reply = Literal["auto", "action", "chunk", "full"]
REPLIES: tuple[Reply, ...] = get_args(Reply)

_LIMITS = JsonLimits(digits=512, non_finite=True)


@dataclass(frozen=True)
class ActRequest:
    """One decoded request for actions."""

    observation: Observation
    # What to answer with: "action", "chunk" or "full"; never "auto".
    reply: Reply
    # The body came as {"encoded": text}, so the reply is a JSON string of JSON text.
    encoded: bool

    def encode(self, chunk: ActionChunk, infer_ms: float) -> bytes:
        """Return the body of the reply."""
        return encode_reply(chunk, self)


def decode_request(body: bytes, contract: PolicyContract, reply: Reply = "auto") -> ActRequest:
    """Return the observation in a request body and the form its reply must have.

    Raises:
        WireError: the body is not a JSON object, or an array in it is damaged.
        InvalidObservation: the request does not fit the policy.
    """
    fields = _object(body)
    encoded = "encoded" in fields
    if encoded:
        if len(fields) != 1 or not isinstance(fields["encoded"], str):
            raise WireError(
                "'encoded' must be the only field and hold JSON text, "
                f"got {type(fields['encoded']).__name__} beside {brief(sorted(fields))}"
            )
        fields = _object(fields["encoded"])
    observation, sources = observation_of(fields, contract, decode_array)
    if reply == "auto":
        pieces = {"state", *contract.field_names.state_fields} & fields.keys()
        openvla = list(sources.values()) == ["image"] and not pieces
        reply = "action" if openvla else "chunk"
    return ActRequest(observation, reply, encoded)


def encode_reply(chunk: ActionChunk, request: ActRequest) -> bytes:
    """Return the body of a reply, actions as float64 as upstream sends them."""
    actions = chunk.actions.astype(np.float64)
    value: Any
    if request.reply == "action":
        value = encode_array(actions[0])
    elif request.reply == "chunk":
        value = [encode_array(action) for action in actions]
    else:
        value = {
            "actions": encode_array(chunk.actions),
            "normalized": encode_array(chunk.normalized),
        }
    text = json.dumps(value)
    return (json.dumps(text) if request.encoded else text).encode()


def encode_request(observation: Observation, contract: PolicyContract) -> bytes:
    """Return an observation as an OFT body that names images by the policy's own cameras.

    Raises:
        InvalidObservation: the observation does not fit the policy.
    """
    contract.check(observation)
    fields: dict[str, Any] = {
        name: encode_array(observation.images[name])
        for name in contract.cameras
        if name in observation.images
    }
    if contract.state_dim:
        fields["state"] = encode_array(observation.state)
    return json.dumps({**fields, "instruction": observation.instruction}).encode()


def decode_reply(body: bytes) -> ActionChunk:
    """Return the actions of a "full" reply.

    Raises:
        WireError: the body is something else.
    """
    fields = _object(body)
    parts = {name: decode_array(fields.get(name), name) for name in ("actions", "normalized")}
    for name, part in parts.items():
        if part.dtype != np.float32 or part.ndim != 2 or not np.isfinite(part).all():
            raise WireError(
                f"{name!r} must be finite float32 [horizon, dim], got {part.dtype} {part.shape}"
            )
    return ActionChunk(parts["actions"], parts["normalized"])


def _object(text: bytes | str) -> dict[str, Any]:
    wrong = "the body must be JSON in UTF-8"
    try:
        text = text if isinstance(text, str) else text.decode("utf-8-sig")
        require_bounded_json(text, ACT_LIMITS)
        value = parse_document(text, wrong, _LIMITS)
    except ArtifactError as error:
        raise WireError(str(error)) from None
    except ValueError as error:
        raise WireError(f"{wrong}: {error!s:.300}") from None
    if not isinstance(value, dict):
        raise WireError(f"the body must be a JSON object, got {type(value).__name__}")
    return value
