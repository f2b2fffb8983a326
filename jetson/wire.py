"""The bodies of `POST /act`: OpenVLA's and OpenVLA-OFT's, told apart by their fields.

    OpenVLA  {"image", "instruction", "unnorm_key"?}        -> one action, float64 [dim]
    OFT      {"full_image" | camera names, "*wrist*",
              "state"?, "instruction"}                      -> list of `horizon` arrays [dim]

A body is OpenVLA's when "image" is the only image and there is no "state"; everything else is
OFT's. OpenVLA's clients expect one action, so a chunk's first action answers them; `reply`
overrides that ("full" adds the normalized actions and is what `jetson.client` asks for).
Either body may come as `{"encoded": "<JSON text>"}`; then the reply is a JSON string too.
Sources: openvla and openvla-oft `vla-scripts/deploy.py`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from jetson.arrays import decode_array, encode_array
from jetson.contract import PolicyContract
from jetson.errors import WireError
from qvla_export.action import ActionChunk
from qvla_export.errors import InvalidObservation
from qvla_export.observation import Observation

Reply = Literal["auto", "action", "chunk", "full"]
REPLIES: tuple[Reply, ...] = get_args(Reply)

# Not json.loads: a process that called json_numpy.patch() has replaced it.
_DECODER = json.JSONDecoder()
# Beyond these a request is a mistake or an attack; JPEG's own limit is 65535.
_MAX_IMAGE_SIDE = 8192
_MAX_INSTRUCTION_CHARACTERS = 2000


@dataclass(frozen=True)
class ActRequest:
    """One decoded request for actions."""

    observation: Observation
    # What to answer with: "action", "chunk" or "full"; never "auto".
    reply: Reply
    # The body came as {"encoded": text}, so the reply is a JSON string of JSON text.
    encoded: bool


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
                f"got {type(fields['encoded']).__name__} beside {sorted(fields)[:8]}"
            )
        fields = _object(fields["encoded"])
    _check_key(fields.get("unnorm_key"), contract)
    sources = _camera_fields(fields, contract)
    observation = Observation(
        images={camera: _image(fields[name], name) for camera, name in sources.items()},
        instruction=_instruction(fields.get("instruction")),
        state=_state(fields.get("state"), contract),
    )
    contract.check(observation)
    if reply == "auto":
        openvla = list(sources.values()) == ["image"] and "state" not in fields
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
        name: encode_array(observation.images[name]) for name in contract.cameras
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
    try:
        value = _DECODER.decode(text.decode() if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:  # JSON, UTF-8 or nesting
        raise WireError(f"the body must be JSON in UTF-8: {error}") from None
    if not isinstance(value, dict):
        raise WireError(f"the body must be a JSON object, got {type(value).__name__}")
    return value


def _check_key(key: Any, contract: PolicyContract) -> None:
    if key is not None and key != contract.unnorm_key:
        raise InvalidObservation(
            f"unnorm_key {key!r:.80} is not served; available: [{contract.unnorm_key!r}]. "
            "Send that one or none"
        )


def _camera_fields(fields: Mapping[str, Any], contract: PolicyContract) -> dict[str, str]:
    """Return camera -> request field; the policy's own names win over the dialects' roles."""
    sources = {camera: camera for camera in contract.cameras if camera in fields}
    primary, *others = contract.cameras
    roles = [name for name in ("full_image", "image") if name in fields and name not in sources]
    given = [*roles, *([primary] if primary in sources else [])]
    if len(given) > 1:
        raise InvalidObservation(f"{given} are all the camera {primary!r}; send one of them")
    if roles:
        sources[primary] = roles[0]
    wrists = [name for name in fields if "wrist" in name and name not in sources.values()]
    free = [camera for camera in others if camera not in sources]
    # Upstream ignores wrist images where the policy was trained on the primary one alone.
    if others and len(wrists) > len(free):
        raise InvalidObservation(
            f"the policy's cameras are {list(contract.cameras)}; "
            f"{wrists} are more wrist images than it takes"
        )
    sources.update(zip(free, wrists, strict=False))
    missing = [camera for camera in contract.cameras if camera not in sources]
    if missing:
        raise InvalidObservation(
            f"the policy needs images {list(contract.cameras)}, missing {missing}; send them by "
            "these names, or as 'image' or 'full_image' and '*wrist*'. "
            f"Got {sorted(fields)[:16]}"
        )
    return {camera: sources[camera] for camera in contract.cameras}


def _image(value: Any, name: str) -> NDArray[Any]:
    image = decode_array(value, name)
    if max(image.shape, default=0) > _MAX_IMAGE_SIDE:
        raise InvalidObservation(
            f"image {name!r} must have sides of at most {_MAX_IMAGE_SIDE} pixels, "
            f"got {list(image.shape)}"
        )
    return image


def _state(value: Any, contract: PolicyContract) -> NDArray[Any]:
    # Upstream, too, ignores the state where the policy takes none.
    if not contract.state_dim:
        return np.zeros(0, np.float32)
    if value is None:
        raise InvalidObservation(
            f"the policy needs a state of {contract.state_dim} numbers; send it as 'state'"
        )
    if isinstance(value, list) and all(type(item) in (int, float) for item in value):
        try:
            state = np.array(value, np.float64)
        except OverflowError:
            raise InvalidObservation("state must be finite, got an integer beyond 1e308") from None
    else:
        state = decode_array(value, "state")
    if state.dtype.kind == "f":
        # What overflows float32 becomes infinite here, so that Observation refuses it.
        with np.errstate(over="ignore"):
            state = state.astype(np.float32)
    return state


def _instruction(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise InvalidObservation(f"an 'instruction' in words is required, got {value!r:.80}")
    if len(value) > _MAX_INSTRUCTION_CHARACTERS:
        raise InvalidObservation(
            f"an instruction may have {_MAX_INSTRUCTION_CHARACTERS} characters, got {len(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell lone surrogates, tokenizers choke on them
        raise InvalidObservation(f"an instruction must be text, got {value!r:.80}") from None
    return value
