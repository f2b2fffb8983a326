"""One task of the simulator: seeded episodes, control steps, pictures on demand."""

import itertools
import warnings
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.episode_progress import EpisodeProgress, require_action
from calibration.benchmarks.metaworld.lean_environment import make_lean
from calibration.benchmarks.metaworld.object_state import (
    FIRST,
    OBJECT_STATE,
    add_to_things,
    encode_object_state,
    with_second,
)
from calibration.benchmarks.metaworld.roll_forward import Ahead, roll_forward
from calibration.benchmarks.metaworld.scene_drawing import SceneDrawing, load_mujoco
from calibration.benchmarks.metaworld.shifts import (
    Shift,
    distractor,
    shifted_instruction,
    shifted_pixels,
    shifted_placement,
    shifted_positions,
    shifted_start,
)
from calibration.benchmarks.metaworld.tasks import (
    ACTION_REPEAT,
    HAND_CAMERA,
    Task,
    draw_placement,
)
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

IMAGE_SIZE = 84
ACTION_DIM = 4
ACTION_NAMES = ("x", "y", "z", "gripper")
STATE_DIM = 4

# Numbers of a placement of object and goal.
_WITH_GOAL = 6
# Placements that a reset asks for: two, from environments that do not draw again.
_DRAWS = 8


class Simulator(EpisodeProgress[Task]):
    """A Meta-World scene behind the nouns of this project.

    The same task, seed and actions give the same states and the same picture bytes, whatever the
    object was used for before.  Rendering happens only in `observe` and `reset`, and not at all
    where the task shows its object state instead of a picture.
    """

    def __init__(self, task: Task, image_size: int = IMAGE_SIZE) -> None:
        super().__init__(task)
        self.instruction = task.instruction
        self.image_size = image_size
        self._mujoco = load_mujoco()
        self._environment = _build_environment(task)
        make_lean(self._environment)
        self._drawing = SceneDrawing(self._mujoco, self._environment.model, image_size)
        self._pristine = self._copy_placements()
        # What this episode changes of what the task was trained on, and the episode's seed.
        self._shift: Shift | None = None
        self._seed = 0
        self._full_state: NDArray[np.float64] = np.zeros(39)
        # Where this episode's object (and goal) was put.  float64 [3 or 6]
        self.placement: NDArray[np.float64] = np.zeros(0)

    def __enter__(self) -> "Simulator":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the renderer and the environment; a second call does nothing."""
        self._drawing.close()
        self._environment.close()

    @property
    def full_state(self) -> NDArray[np.float64]:
        """What a scripted expert sees, object and goal positions included.  float64 [39]"""
        return self._full_state.copy()

    @property
    def state(self) -> NDArray[np.float32]:
        """Hand position in metres and gripper opening 0..1.  float32 [4]"""
        return self._full_state[:STATE_DIM].astype(np.float32)

    @property
    def hand(self) -> NDArray[np.float64]:
        """Hand position, metres.  float64 [3]"""
        return self._full_state[:3].copy()

    @property
    def goal_distance_m(self) -> float:
        """From the first thing to where the goal was put; infinite where a task draws none."""
        if len(self.placement) < _WITH_GOAL:
            return super().goal_distance_m
        return float(np.linalg.norm(self.placement[3:6] - self._full_state[FIRST]))

    def reset(
        self, seed: int, instruction: str | None = None, shift: Shift | None = None
    ) -> Observation:
        """Start the episode of that seed; say another instruction than the canonical one.

        A shift changes what it names, and nothing else of the episode.

        Raises:
            QvlaError: object and goal are drawn closer than this environment allows.
        """
        random = np.random.default_rng(seed)
        placement = draw_placement(self.task, random)
        hand = random.uniform(*self.task.hand)
        fraction = random.uniform()
        said = instruction or self.task.instruction
        if shift is not None and shift.kind == "placement":
            placement = shifted_placement(shift, self.task, placement, seed)
        elif shift is not None and shift.kind == "start":
            hand = shifted_start(shift, hand, seed)
        elif shift is not None and shift.kind == "instruction":
            said = shifted_instruction(shift, self.task, said, seed)
        self._shift, self._seed = shift, seed
        self._drawing.shift(shift, seed, placement)
        self._drawing.marker = placement[3:6] if self.task.marker else None
        environment = self._environment
        self._restore_placements()
        environment._get_state_rand_vec = _frozen_draw(self.task, placement)
        environment.hand_init_pos = hand
        environment.reset()
        if (start := self.task.start) is not None:
            opening = start.low + fraction * (start.high - start.low)
            environment.data.joint(start.name).qpos = opening
            environment.data.joint(start.name).qvel = 0.0
        self._mujoco.mj_forward(environment.model, environment.data)
        self._full_state = environment._get_obs()
        self.placement = placement
        self.instruction = said
        self._begin()
        return self.observe()

    def step(self, action: NDArray[np.float32]) -> bool:
        """Apply one action (hand dx, dy, dz and gripper, clipped to -1..1) for one control step.

        Returns whether the task has been solved by now.  Nothing is rendered.
        """
        action = np.clip(np.asarray(action, dtype=np.float32), -1.0, 1.0)
        require_action(action, ACTION_DIM)
        solved = False
        for _ in range(ACTION_REPEAT):
            self._full_state, _, _, _, info = self._environment.step(action)
            solved = solved or bool(info["success"])
        return self._count_step(solved)

    def observe(self, ahead: Ahead | None = None) -> Observation:
        """Return what the policy sees now; the scene is rendered where it sees a picture.

        With `ahead` it is shown the state after that: the hand's, and in an object state also where
        things are from there. Pictures stay.
        """
        full_state, goal = self._shown_positions()
        if ahead is not None:
            full_state = roll_forward(full_state, ahead)
        if self.task.camera == OBJECT_STATE:
            images = {OBJECT_STATE: encode_object_state(full_state, goal)}
        else:
            images = self._pictures()
        state = full_state[:STATE_DIM].astype(np.float32)
        return Observation(images, self.instruction, state)

    def object_state(self) -> NDArray[np.uint8]:
        """Return where things are as an object state, whatever the task shows.  uint8 [4, 4, 3]"""
        return encode_object_state(self._full_state, self.placement[3:6])

    def render(self) -> NDArray[np.uint8]:
        """Return the picture of the fixed camera.  uint8 [image_size, image_size, 3]"""
        return self._drawing.draw(self._environment.data)

    def _pictures(self) -> dict[str, NDArray[np.uint8]]:
        """Return what the task's cameras see, with the noise of the episode's shift."""
        images: dict[str, NDArray[np.uint8]] = {self.task.camera: self.render()}
        if self.task.hand_camera:
            images[HAND_CAMERA] = self._drawing.draw(self._environment.data, self.hand)
        shift = self._shift
        if shift is None or shift.kind != "noise":
            return images
        # Each camera's look counts, so that each has noise of its own.
        first = self.steps * len(images)
        return {
            name: shifted_pixels(shift, image, self._seed, first + camera)
            for camera, (name, image) in enumerate(images.items())
        }

    def _shown_positions(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return full state and goal as an object state shows them."""
        full_state, goal, shift = self._full_state, self.placement[3:6], self._shift
        if self.task.camera != OBJECT_STATE:
            return full_state, goal
        if shift is not None and shift.kind == "noise":
            return add_to_things(full_state, goal, shifted_positions(shift, self._seed, self.steps))
        if shift is not None and shift.kind == "distractors":
            return with_second(full_state, distractor(shift, self.placement, self._seed)), goal
        return full_state, goal

    def _copy_placements(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        model = self._environment.model
        return model.body_pos.copy(), model.site_pos.copy()

    def _restore_placements(self) -> None:
        # An episode moves bodies in the model itself; the next one must not start among them.
        model = self._environment.model
        model.body_pos[:], model.site_pos[:] = self._pristine


def _frozen_draw(task: Task, placement: NDArray[np.float64]) -> Callable[[], NDArray[np.float64]]:
    """Return what Meta-World is to draw an episode's placement with: always the same.

    Some of its environments draw again until object and goal are far enough apart, with a frozen
    draw for ever.
    """
    draws = itertools.count(1)

    def draw() -> NDArray[np.float64]:
        if next(draws) > _DRAWS:
            raise QvlaError(
                f"{task.environment} refuses the placement {placement.round(3).tolist()} of "
                f"{task.name}: object and goal lie too close on the table, and the task allows "
                f"{task.apart} m; raise its `apart`"
            )
        return placement

    return draw


def _build_environment(task: Task) -> Any:
    with warnings.catch_warnings():
        # gymnasium and metaworld warn of their own deprecated calls; nothing here can mend them.
        warnings.simplefilter("ignore")
        try:
            from metaworld.env_dict import ALL_V3_ENVIRONMENTS
        except ImportError as error:
            raise QvlaError(
                f"the simulator needs metaworld: pip install 'qvla[sim]' ({error})"
            ) from None
        environment = ALL_V3_ENVIRONMENTS[task.environment]()
    environment._partially_observable = False
    # The space cached while the goal was hidden would clip the goal to zero.
    environment.__dict__.pop("sawyer_observation_space", None)
    if len(task.placement[0]) == _WITH_GOAL:
        # What experts see of the goal is clipped to this; placements are wider than Meta-World's.
        environment.goal_space = _unclipped()
    environment._set_task_called = True
    # The step limit is ours (in control steps), not Meta-World's.
    environment.max_path_length = 1 << 62
    return environment


def _unclipped() -> Any:
    from gymnasium.spaces import Box

    return Box(-1.0, 1.0, (3,), np.float64)
