"""One task of LIBERO: official initial states and what OpenVLA's evaluation does around them.

As `run_libero_eval.py` of openvla and openvla-oft: the environment is seeded with 0, the episode's
initial state is set, ten steps with the gripper open let things settle, pictures of 256 x 256 are
turned by 180 degrees, the state is position, axis and angle of the hand and both fingers, and
episodes have the suite's limit. What the pictures go through then (JPEG, lanczos to 224, centre
crop) is the policy's own preprocessing.
"""

import contextlib
import io
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.episode_progress import EpisodeProgress, require_action
from calibration.benchmarks.libero.initial_states import load_initial_states
from calibration.benchmarks.libero.libero_tasks import LiberoTask
from calibration.benchmarks.libero.sampled_scene import SampledScene
from calibration.benchmarks.metaworld.roll_forward import Ahead
from calibration.benchmarks.metaworld.shifts import Shift
from calibration.benchmarks.rendering import choose_renderer
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

PICTURE_SIZE = 256
LIBERO_ACTION_DIM = 7
_SEED = 0
_SETTLING_STEPS = 10
_STILL_OPEN = (0.0,) * 6 + (-1.0,)
# Who the pictures are of, by what every policy's clients may call them.
_CAMERAS = {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
# Of robosuite's scenes: what collides.
_COLLISION_GROUP = 0
_REMEDY = "make simulators-env, then: .simulators/bin/python -m qvla_export evaluate ..."


@dataclass(frozen=True)
class LiberoFiles:
    """What the package has of a task."""

    # What is said to the policy.
    language: str
    # The scene's description (BDDL) and the official initial states.
    scene: Path
    states: Path


class LiberoSimulator(EpisodeProgress[LiberoTask]):
    """A LIBERO task behind the nouns of an episode; pictures are drawn in `observe` only."""

    def __init__(self, task: LiberoTask) -> None:
        """Build the scene.

        Raises:
            QvlaError: the benchmark is not installed here, or has no such task.
        """
        super().__init__(task)
        files = find_libero(task)
        self.language = files.language
        self._states = load_initial_states(files.states)
        self.environment = _build(files.scene, task.fast)
        self._moment: dict[str, Any] = {}
        self._scene = SampledScene(self.environment.env)
        if task.fast:
            _colour_things(self.environment.sim.model)

    @property
    def hand(self) -> NDArray[np.float64]:
        """Hand position, metres.  float64 [3]"""
        return np.array(self._moment["robot0_eef_pos"], np.float64)

    def reset(
        self, seed: int, instruction: str | None = None, shift: Shift | None = None
    ) -> Observation:
        """Start from an official initial state: the seed's, of as many as there are, in turn.

        Raises:
            QvlaError: another instruction or a shift is asked for.
        """
        self._refuse_changes(instruction, shift)
        environment = self.environment
        environment.seed(_SEED)
        environment.reset()
        for robot in environment.robots:
            # What fingers are told goes up to its value step by step, and a reset leaves it.
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        self._moment = environment.set_init_state(self._states[seed % len(self._states)])
        for _ in range(_SETTLING_STEPS):
            self._moment = environment.step(list(_STILL_OPEN))[0]
        self._begin()
        return self.observe()

    def step(self, action: NDArray[np.float32]) -> bool:
        """Apply one action: steps of position and rotation, and the gripper, -1 opens, +1 closes.

        Returns whether the task has been solved by now.  Nothing is drawn.
        """
        require_action(action, LIBERO_ACTION_DIM)
        self._moment, _, done, _ = self.environment.step(action.tolist())
        return self._count_step(bool(done))

    def observe(self, ahead: Ahead | None = None) -> Observation:
        """Return what the policy sees: both cameras and the state, of one moment."""
        images = {
            name: np.ascontiguousarray(self._scene.draw(camera, PICTURE_SIZE)[::-1, ::-1])
            for name, camera in _CAMERAS.items()
        }
        return Observation(images, self.language, libero_state(self._moment))

    def close(self) -> None:
        """Free the scene and its renderer."""
        self.environment.close()


def libero_state(moment: dict[str, Any]) -> NDArray[np.float32]:
    """Return position, axis times angle, and both fingers, as OpenVLA's evaluation does.

    float32 [8]
    """
    parts = (
        moment["robot0_eef_pos"],
        axis_angle(moment["robot0_eef_quat"]),
        moment["robot0_gripper_qpos"],
    )
    return np.concatenate(parts).astype(np.float32)


def axis_angle(quaternion: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return axis times angle of a quaternion x, y, z, w, angles up to a whole turn.

    robosuite's `quat2axisangle`: a quaternion and its negative, which turn alike, differ here.
    """
    cosine = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - cosine * cosine)
    if np.isclose(sine, 0.0, rtol=1e-9, atol=0.0):
        return np.zeros(3)
    turned: NDArray[np.float64] = np.asarray(quaternion[:3]) * 2.0 * np.arccos(cosine) / sine
    return turned


def find_libero(task: LiberoTask) -> LiberoFiles:
    """Return what the package has of a task.

    Raises:
        QvlaError: it is not installed, or has no such task.
    """
    choose_renderer()
    # It tells what it does on stdout, which may be a document.
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            from libero.libero import benchmark, get_libero_path
        except ImportError as error:
            raise QvlaError(
                f"{task.name} needs LIBERO and robosuite 1.4, which have an environment of their "
                f"own: {_REMEDY} ({error})"
            ) from None
        suites = benchmark.get_benchmark_dict()
        if task.suite not in suites:
            raise QvlaError(f"LIBERO has no suite {task.suite!r}; it has {', '.join(suites)}")
        suite = suites[task.suite]()
        if task.index >= suite.n_tasks:
            raise QvlaError(f"{task.suite} has {suite.n_tasks} tasks, there is no {task.name}")
        entry = suite.get_task(task.index)
        scenes, states = Path(get_libero_path("bddl_files")), Path(get_libero_path("init_states"))
    folder = entry.problem_folder
    scene, states = scenes / folder / entry.bddl_file, states / folder / entry.init_states_file
    return LiberoFiles(str(entry.language), scene, states)


def _build(bddl: Path, fast: bool) -> Any:
    with contextlib.redirect_stdout(io.StringIO()):
        from libero.libero.envs.env_wrapper import ControlEnv

        return ControlEnv(
            bddl_file_name=str(bddl),
            use_camera_obs=False,
            has_renderer=False,
            has_offscreen_renderer=True,
            # Another initial state needs no other model.
            hard_reset=False,
            render_collision_mesh=fast,
            render_visual_mesh=not fast,
        )


def _colour_things(model: Any) -> None:
    """Give what collides one colour a thing, by its name; the same in every episode."""
    for geom in np.flatnonzero(model.geom_group == _COLLISION_GROUP):
        thing = model.body_id2name(model.geom_bodyid[geom]) or ""
        digest = zlib.crc32(thing.partition("_1")[0].encode())
        colour = [64 + (digest >> shift & 0xFF) % 192 for shift in (0, 8, 16)]
        model.geom_rgba[geom] = [*(value / 255 for value in colour), 1.0]
