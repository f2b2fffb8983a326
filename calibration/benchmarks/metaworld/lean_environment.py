"""Meta-World without what nobody here reads: dense rewards and orientations, half of its time."""

from typing import Any

import numpy as np
from numpy.typing import NDArray


def make_lean(environment: Any) -> None:
    """Leave the reward of a grasp and the objects' orientations of an environment uncomputed.

    Positions, the gripper and whether the task is solved stay what they are. The test of touch,
    which some tasks need for that, gives the same answer without a Python object for every
    contact of the scene.
    """
    orientations: NDArray[np.float64] = np.zeros_like(environment._get_quat_objects())

    def get_orientations() -> NDArray[np.float64]:
        return orientations

    def reward_grasp(*_: Any, **__: Any) -> float:
        return 0.0

    def is_touching(thing: int) -> bool:
        return _is_touching(environment.data, thing)

    environment._get_quat_objects = get_orientations
    environment._gripper_caging_reward = reward_grasp
    environment.touching_object = is_touching


def _is_touching(data: Any, thing: int) -> bool:
    """Whether both pads of the gripper press on a geom (`SawyerXYZEnv.touching_object`)."""
    # Pairs of geoms, int [contacts, 2], and where each contact's forces stand.
    pairs, addresses = data.contact.geom, data.contact.efc_address
    pressed = (pairs == thing).any(axis=1)
    for pad in ("leftpad_geom", "rightpad_geom"):
        touched = pressed & (pairs == data.geom(pad).id).any(axis=1)
        if data.efc_force[addresses[touched]].sum() <= 0:
            return False
    return True
