"""What GR00T's clients send and are told: observations in three forms, actions, modalities.

    data     {"observation": {"video": {camera: uint8 [1, 1, h, w, 3]},
                              "state": {name: float [1, 1, n]},
                              "language": {any one key: [[instruction]]}}, "options"}
             or the same keys flat: "video.<camera>", "state.<name>", and any other for language;
             N1.5's clients send the flat keys as "data" itself, with time alone in front
    reply    [{name: float32 [1, horizon, n]}, {"timing_ms": ...}], flat "action.<name>"; to N1.5
             {"action.<name>": float32 [horizon, n]}. Without names of its own an action is whole:
             "actions"

Sources: Isaac-GR00T `gr00t/policy/gr00t_policy.py` and `gr00t/eval/real_robot/SO100/eval_so100.py`
(N1.6, N1.7), `gr00t/eval/service.py` and `getting_started/examples/eval_lerobot.py` (N1.5), read as
a description.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from jetson.errors import WireError
from jetson.serving.arrays import decode_npy, encode_npy
from jetson.serving.field_names import WHOLE_ACTION, FieldNames
from jetson.serving.fields import observation_of
from jetson.serving.message_pack import pack
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.json_documents import brief
from qvla_export.shared.observation import Observation


@dataclass(frozen=True)
class Gr00tRequest:
    """One decoded observation, and the form of its keys."""

    observation: Observation
    form: Literal["nested", "flat", "n1.5"]
    # What the client calls the pieces of an action.
    names: FieldNames

    def encode(self, chunk: ActionChunk, infer_ms: float) -> bytes:
        """Return the reply: [action, info], or for N1.5 the action alone."""
        batch = chunk.actions if self.form == "n1.5" else chunk.actions[None]
        prefix = "" if self.form == "nested" else "action."
        action = {
            f"{prefix}{name}": _npy(piece) for name, piece in self.names.pieces(batch).items()
        }
        if self.form == "n1.5":
            return pack(action)
        return pack([action, {"timing_ms": {**chunk.timing_ms, "infer": infer_ms}}])


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
        return Gr00tRequest(observation, "n1.5", contract.field_names)
    entries = _map(data.get("observation"), "observation")
    nested = "video" in entries
    fields = _fields(entries if nested else _nest(entries), contract)
    observation, _ = observation_of(fields, contract, _array)
    form: Literal["nested", "flat"] = "nested" if nested else "flat"
    return Gr00tRequest(observation, form, contract.field_names)


def modality_config(contract: PolicyContract) -> dict[str, Any]:
    """Return what `get_modality_config` answers: the keys and steps a client sends and gets."""
    states = list(contract.field_names.state_fields) or ["state"]
    actions = [name for name, _ in contract.field_names.action_fields] or [WHOLE_ACTION]
    keys = {"video": list(contract.cameras), "state": states, "language": ["instruction"]}
    if not contract.state_dim:
        del keys["state"]
    return {
        **{name: _modality([0], names) for name, names in keys.items()},
        "action": _modality(list(range(contract.horizon)), actions),
    }


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
        raise WireError(f"cameras must have names of their own, got {brief(list(video))}")
    if twice := {*video} & {*states}:
        raise WireError(f"{brief(sorted(twice))} are cameras and states; send each name once")
    if len(language) != 1 and (language or not _may_be_silent(contract)):
        raise InvalidObservation(
            f"an observation needs one 'language' entry, got {brief(list(language))}"
        )
    pieces = contract.field_names.state_fields
    if not {*states} & {*pieces} and states:
        if len(states) > 1 and contract.state_dim:
            known = f"one of {list(pieces)}" if pieces else "qvla serve --state-fields NAME,NAME"
            raise InvalidObservation(
                "several states are put together in the order the server was given; got "
                f"{brief(list(states))}. Name them: {known}"
            )
        states = {"state": next(iter(states.values()))}
    instruction = next(iter(language.values()), None)
    # [[text]]: batch and time; the flat form has no time.
    for _ in range(2):
        if isinstance(instruction, list) and len(instruction) == 1:
            instruction = instruction[0]
    return {**video, **states, "instruction": instruction}


def _may_be_silent(contract: PolicyContract) -> bool:
    """Whether a client need not say what to do."""
    return bool(contract.instruction) or not contract.reads


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
