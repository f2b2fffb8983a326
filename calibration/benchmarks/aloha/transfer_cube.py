"""gym-aloha's transfer of a cube between hands: for policies of 14 joints and a top camera."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.episode_progress import EpisodeProgress, require_action
from calibration.benchmarks.metaworld.roll_forward import Ahead
from calibration.benchmarks.metaworld.shifts import Shift
from calibration.benchmarks.rendering import choose_renderer
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

ALOHA_NAME: Final = "aloha-transfer-cube"
ALOHA_DIM: Final = 14
# As gym-aloha registers the task: 6 s.
_STEPS = 300
_HEIGHT, _WIDTH = 480, 640
# gym-aloha's reward of a cube that the left hand alone holds.
_TRANSFERRED = 4
_INSTRUCTION = "pick up the cube with the right arm and transfer it to the left arm"
_REMEDY = "make simulators-env, then: .simulators/bin/python -m qvla_export evaluate ..."


@dataclass(frozen=True)
class AlohaTask:
    """The one task there is."""

    name: str = ALOHA_NAME
    scene: str = ALOHA_NAME
    # Episode limit, control steps.
    steps: int = _STEPS
    # Control steps a second.
    control_hz: int = 50
    # Actions are joint positions, of two hands: no length is a step's.
    unit_mm: None = None


def aloha_task(name: str) -> AlohaTask | None:
    """Return the task that a name means; None where it is none of ALOHA's."""
    return AlohaTask() if name == ALOHA_NAME else None


class TransferCube(EpisodeProgress[AlohaTask]):
    """The task behind the nouns of an episode; the picture is drawn in `observe` only."""

    def __init__(self, task: AlohaTask | None = None) -> None:
        """Build the scene.

        Raises:
            QvlaError: gym-aloha is not installed here.
        """
        super().__init__(task or AlohaTask())
        self._environment, self._place_cube = _build()
        self._joints: NDArray[np.float64] = np.zeros(ALOHA_DIM)

    @property
    def hand(self) -> NDArray[np.float64]:
        """There are two: nothing is said of the motion of one.  float64 [3]"""
        return np.zeros(3)

    def reset(
        self, seed: int, instruction: str | None = None, shift: Shift | None = None
    ) -> Observation:
        """Put the cube where the seed says and both arms where they begin.

        Raises:
            QvlaError: another instruction or a shift is asked for.
        """
        self._refuse_changes(instruction, shift)
        # gym-aloha draws from a generator of 32 bits.
        self._place_cube(seed % (1 << 32))
        self._joints = self._environment.reset().observation["qpos"]
        self._begin()
        return self.observe()

    def step(self, action: NDArray[np.float32]) -> bool:
        """Apply one action: the positions of both arms' joints, radians, grippers 0..1.

        Returns whether the cube has been handed over by now.  Nothing is drawn.
        """
        require_action(action, ALOHA_DIM)
        moment = self._environment.step(action.astype(np.float64))
        self._joints = moment.observation["qpos"]
        return self._count_step(moment.reward == _TRANSFERRED)

    def observe(self, ahead: Ahead | None = None) -> Observation:
        """Return what the policy sees now: from above, and both arms' joints."""
        physics = self._environment.physics
        picture = physics.render(height=_HEIGHT, width=_WIDTH, camera_id="top")
        state = np.asarray(self._joints, np.float32)
        return Observation({"image": np.ascontiguousarray(picture)}, _INSTRUCTION, state)

    def close(self) -> None:
        """Free the scene and its renderer."""
        self._environment.close()


def _build() -> tuple[Any, Callable[[int], None]]:
    """Return dm_control's environment, which draws nothing by itself, and what places the cube."""
    choose_renderer()
    try:
        from gym_aloha.env import AlohaEnv
        from gym_aloha.tasks.sim import BOX_POSE
        from gym_aloha.utils import sample_box_pose
    except ImportError as error:
        raise QvlaError(
            f"{ALOHA_NAME} needs gym-aloha, which has an environment of its own: {_REMEDY} "
            f"({error})"
        ) from None

    def place_cube(seed: int) -> None:
        BOX_POSE[0] = sample_box_pose(seed)

    environment = AlohaEnv("transfer_cube")._env
    task = environment.task

    def joints(physics: Any) -> dict[str, NDArray[np.float64]]:
        return {"qpos": task.get_qpos(physics)}

    # Its own draws three pictures a step.
    task.get_observation = joints
    return environment, place_cube
