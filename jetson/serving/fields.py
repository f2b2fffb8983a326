"""What the fields of a request mean to a policy, whichever protocol brought them.

    images       the policy's own camera names, or their aliases; or "image" / "full_image" for the
                 primary camera and "*wrist*" for the others: left and right by name, else in order
                                                                             uint8 [h, w, 3]
                 cameras that the policy can do without may be absent
    instruction  what to do, in words; may be absent where the server was told what to do, or the
                 policy does not read
    state        numbers; ignored where the policy takes none, as upstream does    [n]
                 or the state fields that the server was given, put together in their order
    unnorm_key   optional; refused where it is not the policy's

Aliases and state fields are those of `jetson.serving.field_names`. Each protocol renames its
fields to these and says how it spells an array.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jetson.serving.camera_sides import match_wrists
from jetson.serving.field_names import PRIMARY_ROLES
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.json_documents import brief
from qvla_export.shared.observation import Observation
from qvla_export.shared.pictures.picture_bounds import picture_fault

# (value, name of the field for the errors) -> array
ArrayDecoder = Callable[[Any, str], NDArray[Any]]

# Beyond it a request is a mistake or an attack; the policy bounds the tokens.
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
        instruction=_instruction(fields.get("instruction"), contract),
        state=_state(fields, contract, array),
    )
    contract.check(observation)
    return observation, sources


def _check_key(key: Any, contract: PolicyContract) -> None:
    if key is not None and key != contract.unnorm_key:
        raise InvalidObservation(
            f"unnorm_key {brief(key)} is not served; available: [{contract.unnorm_key!r}]. "
            "Send that one or none"
        )


def _camera_fields(fields: Mapping[str, Any], contract: PolicyContract) -> dict[str, str]:
    """Return camera -> request field: own names, aliases, then what all clients call them."""
    primary, *others = contract.cameras
    sources: dict[str, str] = {}
    for camera in contract.cameras:
        names = [camera, *contract.field_names.aliases_of(camera)]
        if camera == primary:
            names += [role for role in PRIMARY_ROLES if role not in contract.cameras]
        present = [name for name in dict.fromkeys(names) if name in fields]
        if len(present) > 1:
            raise InvalidObservation(f"{present} are all the camera {camera!r}; send one of them")
        if present:
            sources[camera] = present[0]
    wrists = [name for name in fields if "wrist" in name and name not in sources.values()]
    free = [camera for camera in others if camera not in sources]
    # Upstream ignores wrist images where the policy was trained on the primary one alone.
    if others and len(wrists) > len(free):
        raise InvalidObservation(
            f"the policy's cameras are {list(contract.cameras)}; "
            f"{_named(wrists)} are more wrist images than it takes"
        )
    if others:
        sources |= _wrist_fields(free, wrists, contract)
    missing = [camera for camera in contract.required_cameras if camera not in sources]
    if missing:
        needed = list(contract.required_cameras)
        raise InvalidObservation(
            f"the policy needs images {needed}, missing {missing}; send them by "
            "these names, or as 'image' or 'full_image' and '*wrist*', or tell the server their "
            f"names: qvla serve --camera-alias CAMERA=FIELD. Got {_named(sorted(fields))}"
        )
    return {camera: sources[camera] for camera in contract.cameras if camera in sources}


def _wrist_fields(
    cameras: list[str], wrists: list[str], contract: PolicyContract
) -> dict[str, str]:
    """Return camera -> wrist field: those that must be there first, whatever their sides."""
    needed = [name for name in cameras if name in contract.required_cameras]
    matches = match_wrists(needed, wrists)
    rest = [name for name in wrists if name not in matches.values()]
    return matches | match_wrists([name for name in cameras if name not in needed], rest)


def _named(names: list[str]) -> str:
    return str([name[:80] for name in names[:16]])


def _image(value: Any, name: str, array: ArrayDecoder) -> NDArray[Any]:
    image = array(value, name)
    if image.ndim == 3 and (fault := picture_fault(image.shape[1], image.shape[0])):
        raise InvalidObservation(f"image {name!r}: {fault}")
    return image


def _state(
    fields: Mapping[str, Any], contract: PolicyContract, array: ArrayDecoder
) -> NDArray[Any]:
    # Upstream, too, ignores the state where the policy takes none.
    if not contract.state_dim:
        return np.zeros(0, np.float32)
    names = contract.field_names.state_fields
    present = [name for name in names if name in fields]
    if present:
        return _joined_state(fields, contract, array)
    if fields.get("state") is None:
        pieces = f", or in pieces as {list(names)}" if names else ""
        raise InvalidObservation(
            f"the policy needs a state of {contract.state_dim} numbers; send it as 'state'"
            f"{pieces}. Got {_named(sorted(fields))}"
            + ("" if names else "; qvla serve --state-fields NAME,NAME puts pieces together")
        )
    return _numbers(fields["state"], "state", array)


def _joined_state(
    fields: Mapping[str, Any], contract: PolicyContract, array: ArrayDecoder
) -> NDArray[np.float32]:
    """Return the server's state fields put together in their order; a number counts as one."""
    names = contract.field_names.state_fields
    if missing := [name for name in names if name not in fields]:
        raise InvalidObservation(
            f"the state is put together from {list(names)}, missing {missing}; "
            f"got {_named(sorted(fields))}"
        )
    pieces = [np.atleast_1d(_numbers(fields[name], name, array)) for name in names]
    shapes = {name: list(piece.shape) for name, piece in zip(names, pieces, strict=True)}
    if any(piece.ndim > 1 for piece in pieces):
        raise InvalidObservation(f"pieces of a state are vectors of numbers, got {shapes}")
    if any(piece.dtype.kind not in "fiu" for piece in pieces):
        kinds = {name: str(piece.dtype) for name, piece in zip(names, pieces, strict=True)}
        raise InvalidObservation(f"pieces of a state are numbers, got {kinds}")
    if sum(piece.size for piece in pieces) != contract.state_dim:
        raise InvalidObservation(
            f"the policy needs a state of {contract.state_dim} numbers; {shapes} are "
            f"{sum(piece.size for piece in pieces)}. Name other fields with --state-fields"
        )
    # What overflows float32 becomes infinite here, so that Observation refuses it.
    with np.errstate(over="ignore"):
        return np.concatenate([piece.astype(np.float32) for piece in pieces])


def _numbers(value: Any, name: str, array: ArrayDecoder) -> NDArray[Any]:
    """Return a field as an array: a list of numbers, a number, or as its protocol spells one."""
    if type(value) in (int, float):
        value = [value]
    if isinstance(value, list) and all(type(item) in (int, float) for item in value):
        try:
            numbers = np.array(value, np.float64)
        except OverflowError:
            raise InvalidObservation(
                f"{name} must be finite, got an integer beyond 1e308"
            ) from None
    else:
        numbers = array(value, name)
    if numbers.dtype.kind == "f" and numbers.dtype != np.float32:
        # What overflows float32 becomes infinite here, so that Observation refuses it.
        with np.errstate(over="ignore"):
            numbers = numbers.astype(np.float32)
    return numbers


def _instruction(value: Any, contract: PolicyContract) -> str:
    if value is None and contract.instruction:
        return contract.instruction
    if value in (None, "") and not contract.reads:
        return ""
    if not isinstance(value, str) or not value.strip():
        raise InvalidObservation(
            f"an 'instruction' in words is required, got {brief(value)}; send it, or tell the "
            "server what to do where clients do not say: qvla serve --instruction TEXT"
        )
    if len(value) > _MAX_INSTRUCTION_CHARACTERS:
        raise InvalidObservation(
            f"an instruction may have {_MAX_INSTRUCTION_CHARACTERS} characters, got {len(value)}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell lone surrogates, tokenizers choke on them
        raise InvalidObservation(f"an instruction must be text, got {brief(value)}") from None
    return value
