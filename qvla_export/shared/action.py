"""Actions a policy returns, and the one interface every policy object offers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from qvla_export.shared.observation import Observation

# What an action's last number says to a simulator.
# "robosuite": -1 opens and +1 closes, as LIBERO's controllers take it.
Gripper = Literal["as-is", "robosuite"]


@dataclass(frozen=True)
class ActionChunk:
    """The next actions of a policy and the time each span of computing them took."""

    # Actions in the robot's units.  float32 [horizon, dim]
    actions: NDArray[np.float32]
    # The same before un-normalization.  float32 [horizon, dim]
    normalized: NDArray[np.float32]
    # Stage name -> milliseconds.
    timing_ms: Mapping[str, float] = field(default_factory=dict)
    # What the next observation of the episode has as its history; none where no prompt repeats it.
    history: tuple[int, ...] = ()

    def __repr__(self) -> str:
        horizon, dim = self.actions.shape
        whole = {name: ms for name, ms in self.timing_ms.items() if "." not in name}
        total_ms = whole.pop("total", sum(whole.values()))
        return f"<ActionChunk: {horizon} actions of {dim} dimensions, {total_ms:.1f} ms>"


class ActionPolicy(Protocol):
    """Anything that acts: a torch policy, an engine, a remote server."""

    def infer(self, observation: Observation) -> ActionChunk:
        """Return the next actions for one observation."""
        ...


def following(observation: Observation, chunk: ActionChunk | None) -> Observation:
    """Return an observation as the one after a chunk of the same episode; None: its first one."""
    history = () if chunk is None else chunk.history
    if observation.history == history:
        return observation
    return replace(observation, history=history)


def with_gripper(actions: NDArray[np.float32], gripper: Gripper) -> NDArray[np.float32]:
    """Return actions whose last number means to a simulator what the policy means by it.

    Policies trained on OpenVLA's data sets say 0 to close and 1 to open; for robosuite that is
    decided at a half and turned round. Source: openvla `experiments/robot/robot_utils.py`.

    Args:
        actions: float32 [..., dim]
        gripper: what the simulator takes.
    """
    if gripper == "as-is":
        return actions
    turned: NDArray[np.float32] = actions.copy()
    turned[..., -1] = np.where(actions[..., -1] > 0.5, -1.0, 1.0)
    return turned
