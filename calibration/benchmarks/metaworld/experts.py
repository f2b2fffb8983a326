"""Scripted experts: the action that solves the task from the simulator's full state."""

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.simulator import ACTION_DIM, Simulator
from calibration.benchmarks.metaworld.tasks import Task

# Where Meta-World's full state keeps the object's and the goal's position.
_OBJECT = slice(4, 7)
_GOAL = slice(36, 39)


class Expert:
    """Meta-World's scripted expert of a task."""

    def __init__(self, task: Task) -> None:
        with warnings.catch_warnings():
            # metaworld imports gymnasium modules that warn of their own deprecations.
            warnings.simplefilter("ignore")
            from metaworld.policies import ENV_POLICY_MAP
        policies: Any = ENV_POLICY_MAP
        self._policy = policies[task.environment]()

    def act(self, full_state: NDArray[np.float64]) -> NDArray[np.float32]:
        """Return the expert's action for a full state [39], clipped to -1..1.  float32 [4]"""
        with warnings.catch_warnings():
            # The expert's gains saturate on purpose; we clip as the environment does.
            warnings.simplefilter("ignore")
            action = self._policy.get_action(full_state.copy())
        clipped: NDArray[np.float32] = np.clip(action, -1.0, 1.0).astype(np.float32)
        assert clipped.shape == (ACTION_DIM,)
        return clipped


def solve(
    simulator: Simulator, expert: Expert, seed: int, believed: NDArray[np.float64] | None = None
) -> bool:
    """Let the expert play one episode; return whether it solved the task.

    With `believed`, metres [3], the expert takes the object to have been placed there.  How often
    that still succeeds says how much of the task needs eyes.
    """
    simulator.reset(seed)
    error = np.zeros_like(simulator.full_state)
    if believed is not None:
        error[_OBJECT] = error[_GOAL] = believed - simulator.placement[:3]
    while not simulator.done:
        simulator.step(expert.act(simulator.full_state + error))
    return simulator.success
