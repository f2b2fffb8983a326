"""What the fields of a request mean to a policy, whichever protocol brought them.

    images       the policy's own camera names; or "image" / "full_image" for the primary camera
                 and "*wrist*" for the others: left and right by name, else in order
                                                                             uint8 [h, w, 3]
    instruction  what to do, in words
    state        numbers; ignored where the policy takes none, as upstream does    [n]
    unnorm_key   optional; refused where it is not the policy's

Each protocol renames its fields to these and says how it spells an array.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.serving.camera_sides import match_wrists
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.observation import Observation

# (value, name of the field for the errors) -> array
ArrayDecoder = Callable[[Any, str], NDArray[Any]]

# Beyond these a request is a mistake or an attack; JPEG's own limit is 65535.
_MAX_IMAGE_SIDE = 8192
_MAX_INSTRUCTION_CHARACTERS = 2000


def observation_of(
    fields: Mapping[str, Any], contract: PolicyContract, array: ArrayDecoder
) -> tuple[Observation, dict[str, str]]:
    """Return the observation that request fields hold, and camera -> field it came from.

    Raises:
        WireError: an array is damaged.
        InvalidObservation: the request does not fit the policy.
    """
    _check_key(fields.get("unnorm_key"), contract)
    sources = _camera_fields(fields, contract)
    observation = Observation(
        images={camera: _image(fields[name], name, array) for camera, name in sources.items()},
        instruction=_instruction(fields.get("instruction")),
        state=_state(fields.get("state"), contract, array),
    )
    contract.check(observation)
    return observation, sources


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
            f"{_named(wrists)} are more wrist images than it takes"
        )
    if others:
        sources |= match_wrists(free, wrists)
    missing = [camera for camera in contract.cameras if camera not in sources]
    if missing:
        raise InvalidObservation(
            f"the policy needs images {list(contract.cameras)}, missing {missing}; send them by "
            "these names, or as 'image' or 'full_image' and '*wrist*'. "
            f"Got {_named(sorted(fields))}"
        )
    return {camera: sources[camera] for camera in contract.cameras}


def _named(names: list[str]) -> str:
    return str([name[:80] for name in names[:16]])


def _image(value: Any, name: str, array: ArrayDecoder) -> NDArray[Any]:
    image = array(value, name)
    if max(image.shape, default=0) > _MAX_IMAGE_SIDE:
        raise InvalidObservation(
            f"image {name!r} must have sides of at most {_MAX_IMAGE_SIDE} pixels, "
            f"got {list(image.shape)}"
        )
    return image


def _state(value: Any, contract: PolicyContract, array: ArrayDecoder) -> NDArray[Any]:
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
        state = array(value, "state")
    if state.dtype.kind == "f" and state.dtype != np.float32:
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
