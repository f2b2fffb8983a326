"""A policy before others' benchmarks: its own names for what it sees, their gripper's number."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from qvla_export.shared.action import ActionChunk, Gripper, with_gripper
from qvla_export.shared.observation import Observation

if TYPE_CHECKING:
    from jetson.serving.policy_contract import PolicyContract
    from qvla_export.shared.action import ActionPolicy


@dataclass(frozen=True)
class BenchmarkPolicySource:
    """What opens a policy, picklable. Opened here, any view of "image" and "*wrist*" fits it."""

    source: "Callable[[], ActionPolicy]"
    gripper: Gripper = "as-is"

    def __call__(self) -> "BenchmarkPolicy":
        """Open the policy.

        Raises:
            QvlaError: it does not open.
        """
        from jetson.serving.policy_contract import contract_of

        policy = self.source()
        return BenchmarkPolicy(policy, contract_of(policy), self.gripper)


@dataclass(frozen=True)
class BenchmarkPolicy:
    """Acts as the policy does on what a client of its server would send.

    Cameras are told apart as the server tells them: "image" is the primary one, names with wrist
    are the others; a state is left out where the policy takes none.
    """

    policy: "ActionPolicy"
    contract: "PolicyContract"
    gripper: Gripper

    def infer(self, observation: Observation) -> ActionChunk:
        """Return the next actions, the gripper as the simulator takes it.

        Raises:
            InvalidObservation: the policy needs what the benchmark does not show.
        """
        from jetson.serving.fields import observation_of

        rest = {"instruction": observation.instruction, "state": observation.state}
        view, _ = observation_of({**observation.images, **rest}, self.contract, _as_it_is)
        chunk = self.policy.infer(replace(view, history=observation.history))
        return replace(chunk, actions=with_gripper(chunk.actions, self.gripper))


def _as_it_is(value: Any, name: str) -> NDArray[Any]:
    array: NDArray[Any] = value
    return array
