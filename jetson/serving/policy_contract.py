"""The noun `PolicyContract`: what a client must send to a policy and what it gets back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from jetson.errors import RefusedSetting, WireError
from jetson.serving.field_names import FieldNames
from qvla_export.shared.action import ActionPolicy
from qvla_export.shared.errors import InvalidObservation
from qvla_export.shared.json_documents import brief
from qvla_export.shared.observation import Observation
from qvla_export.shared.pictures.picture_bounds import picture_fault

# Request fields that no camera may be called.
RESERVED_FIELDS = ("instruction", "state", "unnorm_key", "encoded")
# Of policies that resize what they see, and of servers that do not say.
_USUAL_FRAME = (224, 224)


@dataclass(frozen=True)
class PolicyContract:
    """Inputs and outputs of a served policy, and which policy it is.

    Raises:
        RefusedSetting: there is no camera, two share a name, a name is a request field, or all
            cameras may be absent.
    """

    # Image names, primary camera first.
    cameras: tuple[str, ...]
    # Actions in a chunk and dimensions of an action.
    horizon: int
    action_dim: int
    # Length of the proprioceptive state; 0 where the policy takes none.
    state_dim: int
    # Data set whose statistics un-normalize the actions.
    unnorm_key: str
    # Digest of the bundle and the target it was exported for; empty where there is none.
    bundle_digest: str = ""
    target: str = ""
    # What clients may call cameras and pieces of the state, beside the names above.
    field_names: FieldNames = field(default_factory=FieldNames)
    # Cameras that an observation may lack; the policy acts without them.
    optional_cameras: tuple[str, ...] = ()
    # Height and width of a picture that the policy takes for certain; some take no other.
    frame_size: tuple[int, int] = _USUAL_FRAME
    # Whether the policy reads what to do; ACT, for one, does not.
    reads: bool = True
    # What to do where a client does not say; empty: every client must.
    instruction: str = ""

    def __post_init__(self) -> None:
        taken = [name for name in self.cameras if name in RESERVED_FIELDS]
        if not self.cameras or len({*self.cameras}) != len(self.cameras) or taken:
            raise RefusedSetting(
                f"a policy needs distinct camera names other than {list(RESERVED_FIELDS)}, "
                f"got {list(self.cameras)}; rename the cameras in the policy's configuration"
            )
        if not self.required_cameras:
            raise RefusedSetting(
                f"a policy must always see something, and all of {list(self.cameras)} may be "
                "absent; correct optional_cameras in its configuration"
            )

    @property
    def required_cameras(self) -> tuple[str, ...]:
        """Return the cameras that every observation must have."""
        return tuple(name for name in self.cameras if name not in self.optional_cameras)

    def named(self, names: FieldNames, instruction: str | None = None) -> "PolicyContract":
        """Return the contract with names of clients for its cameras, state and action.

        Args:
            names: what clients call them.
            instruction: what to do where a client does not say; None where each must.

        Raises:
            RefusedSetting: they do not fit the policy, or the instruction is blank.
        """
        if instruction is not None and not instruction.strip():
            raise RefusedSetting(f"--instruction says in words what to do, got {instruction!r}")
        fitted = names.of_policy(self.cameras, self.state_dim, self.action_dim)
        return replace(self, field_names=fitted, instruction=instruction or "")

    def check(self, observation: Observation) -> None:
        """Refuse an observation that lacks a camera or whose state has another length.

        Raises:
            InvalidObservation: the message lists what the policy needs.
        """
        missing = [name for name in self.required_cameras if name not in observation.images]
        if missing:
            raise InvalidObservation(
                f"the policy needs images {list(self.required_cameras)}, missing {missing}, "
                f"got {sorted(observation.images)}"
            )
        if self.state_dim and observation.state.shape != (self.state_dim,):
            raise InvalidObservation(
                f"the policy needs a state of {self.state_dim} numbers, "
                f"got {list(observation.state.shape)}; send it as 'state'"
            )

    def blank_observation(self) -> Observation:
        """Return a valid observation of nothing, for warming an engine up."""
        image = np.zeros((*self.frame_size, 3), np.uint8)
        state = np.zeros(self.state_dim, np.float32)
        return Observation(dict.fromkeys(self.cameras, image), "hold still", state)

    def to_json(self) -> dict[str, Any]:
        """Return the contract as `GET /metadata` sends it."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> "PolicyContract":
        """Read what `to_json` wrote; unknown fields are ignored.

        Raises:
            WireError: a field is missing or of the wrong kind.
        """
        kinds: Mapping[str, type] = {
            "horizon": int, "action_dim": int, "state_dim": int,
            "unnorm_key": str, "bundle_digest": str, "target": str,
        }  # fmt: skip
        cameras = value.get("cameras") if isinstance(value, dict) else None
        if not isinstance(cameras, list) or any(not isinstance(name, str) for name in cameras):
            raise WireError(f"policy metadata needs a list of cameras, got {brief(value)}")
        wrong = [name for name, kind in kinds.items() if type(value.get(name)) is not kind]
        if wrong:
            raise WireError(f"policy metadata lacks {wrong}; is the server a `qvla serve`?")
        # Servers before these fields had no such policies.
        optional = value.get("optional_cameras", [])
        if not isinstance(optional, list) or any(not isinstance(name, str) for name in optional):
            raise WireError(f"optional_cameras must be a list of names, got {brief(optional)}")
        size = value.get("frame_size", list(_USUAL_FRAME))
        sides = size if isinstance(size, list) and len(size) == 2 else [0]
        if any(type(side) is not int or picture_fault(side, side) for side in sides):
            raise WireError(f"frame_size must be height and width in pixels, got {brief(size)}")
        return cls(
            cameras=tuple(cameras),
            optional_cameras=tuple(optional),
            frame_size=(sides[0], sides[1]),
            reads=value.get("reads", True) is not False,
            **{name: value[name] for name in kinds},
        )


def contract_of(policy: ActionPolicy) -> PolicyContract:
    """Return the contract of a policy: its own, or that of its processor and bundle.

    Raises:
        RefusedSetting: the policy has neither.
    """
    contract = getattr(policy, "contract", None)
    if isinstance(contract, PolicyContract):
        return contract
    processor = processor_of(policy)
    if processor is None:
        raise RefusedSetting(
            f"{type(policy).__name__} has neither a contract nor a processor; "
            "pass contract=PolicyContract(...)"
        )
    bundle, spec = getattr(policy, "bundle", None), processor.spec
    return PolicyContract(
        cameras=tuple(spec.cameras),
        horizon=spec.horizon,
        action_dim=spec.action_dim,
        state_dim=spec.state_dim,
        unnorm_key=processor.statistics.key,
        bundle_digest=getattr(bundle, "digest", ""),
        target=getattr(bundle, "target", ""),
        optional_cameras=tuple(spec.optional_cameras),
        frame_size=spec.frame_size,
        reads=spec.language != "none",
    )


def require_no_history(policy: ActionPolicy) -> None:
    """Refuse a policy whose prompt repeats what it chose at the step before.

    Raises:
        RefusedSetting: it does, and requests do not say which step they follow.
    """
    processor = processor_of(policy)
    if processor is not None and processor.spec.history is not None:
        raise RefusedSetting(
            "the policy's prompt repeats the tokens of the step before (history 1), and neither "
            "requests nor recordings say which step they follow; act with it in qvla run or qvla "
            "evaluate, or write history 0 into the checkpoint's qvla_policy.json and export anew"
        )


def processor_of(policy: ActionPolicy) -> Any:
    """Return the `shared.processor.Processor` of a policy or its bundle; None without one."""
    bundle = getattr(policy, "bundle", None)
    return getattr(bundle if bundle is not None else policy, "processor", None)
