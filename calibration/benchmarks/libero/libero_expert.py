"""A scripted expert of libero_object, which looks behind the pictures."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.libero.libero_simulator import LiberoSimulator
from qvla_export.shared.errors import QvlaError

Vector = NDArray[np.float64]

_OPEN, _CLOSED = -1.0, 1.0
# Actions a metre that the hand is off; an action of 1 is 5 cm.
_GAIN = 10.0
# How near counts as there, metres, and after how many steps it is given up.
_NEAR, _PATIENCE = 0.012, 60
# Above the thing; above everything, with the thing in hand; above the basket's rim: metres.
_HOVER, _CARRY, _DROP = 0.10, 0.30, 0.20
# Of the hand above the thing's middle when it closes, metres, and steps that closing takes.
_GRASP, _CLOSING_STEPS = 0.0, 15


class LiberoExpert:
    """Solves one episode of a libero_object task with the state that only the simulator has."""

    def __init__(self, simulator: LiberoSimulator) -> None:
        """Plan an episode that was just reset.

        Raises:
            QvlaError: the task is of another suite.
        """
        if simulator.task.suite != "libero_object":
            raise QvlaError(f"the expert solves libero_object, not {simulator.task.suite}")
        self._simulator = simulator
        self._thing, self._basket = simulator.environment.obj_of_interest[:2]
        self._plan = self._actions()

    def act(self) -> NDArray[np.float32]:
        """Return the next action.  float32 [7]"""
        return next(self._plan, _action(np.zeros(3), _OPEN))

    def _actions(self) -> Iterator[NDArray[np.float32]]:
        thing, basket = self._where(self._thing), self._where(self._basket)
        yield from self._go(_above(thing, _HOVER), _OPEN)
        yield from self._go(_above(self._where(self._thing), _GRASP), _OPEN)
        for _ in range(_CLOSING_STEPS):
            yield _action(np.zeros(3), _CLOSED)
        hand = self._simulator.hand
        yield from self._go(np.array([hand[0], hand[1], _CARRY]), _CLOSED)
        yield from self._go(np.array([basket[0], basket[1], _CARRY]), _CLOSED)
        yield from self._go(np.array([basket[0], basket[1], _DROP]), _CLOSED)

    def _go(self, target: Vector, gripper: float) -> Iterator[NDArray[np.float32]]:
        for _ in range(_PATIENCE):
            off = target - self._simulator.hand
            if np.linalg.norm(off) < _NEAR:
                return
            yield _action(_GAIN * off, gripper)

    def _where(self, name: str) -> Vector:
        inner = self._simulator.environment.env
        return np.array(inner.sim.data.body_xpos[inner.obj_body_id[name]], np.float64)


def _above(place: Vector, height: float) -> Vector:
    return np.asarray(place + np.array([0.0, 0.0, height]))


def _action(step: Vector, gripper: float) -> NDArray[np.float32]:
    action = np.zeros(7, np.float32)
    action[:3] = np.clip(step, -1.0, 1.0)
    action[6] = gripper
    return action
