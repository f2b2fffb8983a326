"""The language-named tasks: scenes, phrasings and how widely each scene is randomized.

Eight of large objects and drawn pictures, which forgive small errors, and six precise ones, where
millimetres of a grasp or an insertion decide, shown as object state or in the pictures of two
cameras.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.disturbance import Disturbance
from calibration.benchmarks.metaworld.object_state import OBJECT_STATE
from qvla_export.shared.errors import QvlaError

Bounds = tuple[tuple[float, ...], tuple[float, ...]]

# Simulator steps per control step: the policy acts at half the simulator's 80 Hz.
ACTION_REPEAT: Final = 2
CONTROL_HZ: Final = 40
# Of an action of 1: the simulator moves the hand's target by 10 mm (`action_scale`) at each step.
UNIT_MM: Final = 10.0 * ACTION_REPEAT
# Names of the cameras that draw: one that stands still, one that follows the hand.
CAMERA: Final = "image"
HAND_CAMERA: Final = "hand_image"
# Where the hand may start: low and high corner, metres, in front of and above every object.
_HAND: Bounds = ((-0.2, 0.45, 0.15), (0.2, 0.6, 0.3))


@dataclass(frozen=True)
class Joint:
    """A joint of the scene that starts anywhere in a range (metres or radians)."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Task:
    """One thing to do in one scene.

    Tasks that share a scene draw the same placements and start states from the same seed: only
    the instruction tells them apart.
    """

    name: str
    # Meta-World environment that judges success, e.g. "drawer-open-v3".
    environment: str
    # Tasks with the same scene cannot be told apart from a picture.
    scene: str
    # The first phrasing is the canonical one; evaluation uses it.
    instructions: tuple[str, ...]
    # Low and high corner of the object's (and where it has one, the goal's) placement, metres.
    placement: Bounds
    # Episode limit, control steps.
    steps: int
    # The moving part, where its start state is drawn too.
    start: Joint | None = None
    # Low and high corner of the hand's start position, metres.
    hand: Bounds = _HAND
    # Object and goal start at least this far apart on the table, metres.
    apart: float = 0.0
    # What the policy is shown: a drawn picture, or `OBJECT_STATE`, for which nothing is drawn.
    camera: Literal["image", "object_state"] = CAMERA
    # Whether the camera that follows the hand draws too.
    hand_camera: bool = False
    # Whether the goal is drawn, where nothing of the scene stands there.
    marker: bool = False
    # What happens to an expert's actions while it demonstrates.
    disturbance: Disturbance = field(default_factory=Disturbance)

    @property
    def instruction(self) -> str:
        """The canonical phrasing."""
        return self.instructions[0]

    @property
    def control_hz(self) -> int:
        """Control steps a second."""
        return CONTROL_HZ

    @property
    def unit_mm(self) -> float:
        """How far an action of 1 moves the hand, mm."""
        return UNIT_MM


_STEPS = 120
# Placements drawn before one far enough apart is given up.
_REJECTIONS = 1000
_DRAWER: Bounds = ((-0.3, 0.78, 0.0), (0.3, 0.92, 0.0))
_DRAWER_START = Joint("goal_slidey", -0.12, -0.08)
_WINDOW: Bounds = ((-0.3, 0.7, 0.16), (0.15, 0.9, 0.16))
_WINDOW_START = Joint("window_slide", 0.07, 0.13)
_FAUCET: Bounds = ((-0.3, 0.65, 0.0), (0.3, 0.85, 0.0))
_BUTTON: Bounds = ((-0.3, 0.7, 0.115), (0.3, 0.9, 0.115))
_HANDLE: Bounds = ((-0.3, 0.75, 0.0), (0.3, 0.9, 0.0))

_TASKS = (
    Task(
        "drawer-open",
        "drawer-open-v3",
        "drawer",
        ("open the drawer", "pull the drawer open", "slide the drawer out"),
        _DRAWER,
        _STEPS,
        _DRAWER_START,
    ),
    Task(
        "drawer-close",
        "drawer-close-v3",
        "drawer",
        ("close the drawer", "push the drawer shut", "slide the drawer in"),
        _DRAWER,
        _STEPS,
        _DRAWER_START,
    ),
    Task(
        "window-open",
        "window-open-v3",
        "window",
        ("open the window", "slide the window open", "push the window to the right"),
        _WINDOW,
        _STEPS,
        _WINDOW_START,
    ),
    Task(
        "window-close",
        "window-close-v3",
        "window",
        ("close the window", "slide the window shut", "push the window to the left"),
        _WINDOW,
        _STEPS,
        _WINDOW_START,
    ),
    Task(
        "faucet-open",
        "faucet-open-v3",
        "faucet",
        ("open the faucet", "turn the faucet on", "turn the tap to the right"),
        _FAUCET,
        _STEPS,
    ),
    Task(
        "faucet-close",
        "faucet-close-v3",
        "faucet",
        ("close the faucet", "turn the faucet off", "turn the tap to the left"),
        _FAUCET,
        _STEPS,
    ),
    Task(
        "button-press-topdown",
        "button-press-topdown-v3",
        "button",
        ("press the button", "push the red button down", "hit the button from above"),
        _BUTTON,
        _STEPS,
    ),
    Task(
        "handle-press",
        "handle-press-v3",
        "handle",
        ("press the handle down", "push the red handle down", "push down on the lever"),
        _HANDLE,
        _STEPS,
    ),
)
# Task name -> task, in a fixed order.
TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _TASKS})

# Where the hand starts above every object.
_ABOVE: Bounds = ((-0.1, 0.5, 0.2), (0.1, 0.6, 0.3))
# The puck where it comes to rest; the marker so high that under it and at it are different places.
_PUCK: Bounds = ((-0.2, 0.55, 0.0194, -0.2, 0.75, 0.15), (0.2, 0.75, 0.0194, 0.2, 0.9, 0.28))
_NUT: Bounds = ((-0.15, 0.55, 0.02, -0.15, 0.72, 0.1), (0.15, 0.7, 0.02, 0.15, 0.88, 0.1))
_HOLE: Bounds = ((-0.2, 0.55, 0.05, -0.04, 0.8, -0.02), (0.2, 0.75, 0.05, 0.04, 0.88, -0.02))
_PEG: Bounds = ((0.0, 0.55, 0.02, -0.35, 0.4, 0.0), (0.2, 0.7, 0.02, -0.25, 0.7, 0.0))
_STICK: Bounds = ((-0.2, 0.5, 0.0, 0.399, 0.55, 0.132), (0.0, 0.7, 0.0, 0.401, 0.6, 0.132))
# More of it and experts drop what they hold.
_GENTLE = Disturbance(noise=0.21, kicks=0.012)


def _precise(
    name: str, scene: str, placement: Bounds, apart: float, instructions: tuple[str, ...]
) -> Task:
    return Task(
        name,
        f"{name}-v3",
        scene,
        instructions,
        placement,
        _STEPS,
        hand=_ABOVE,
        apart=apart,
        camera=OBJECT_STATE,
        disturbance=_GENTLE,
    )


_PRECISE = (
    _precise(
        "pick-place",
        "puck",
        _PUCK,
        0.15,
        ("lift the puck to the marker", "pick the puck up to the marker", "raise the puck"),
    ),
    _precise(
        "push",
        "puck",
        _PUCK,
        0.15,
        ("push the puck under the marker", "slide the puck below the marker", "shove the puck"),
    ),
    _precise(
        "assembly",
        "nut",
        _NUT,
        0.1,
        ("put the ring over the peg", "hang the ring on the peg", "assemble ring and peg"),
    ),
    _precise(
        "hand-insert",
        "hole",
        _HOLE,
        0.15,
        ("put the block into the hole", "lower the block into the hole", "sink the block"),
    ),
    _precise(
        "peg-insert-side",
        "peg",
        _PEG,
        0.1,
        ("insert the peg from the side", "slide the peg into the box", "plug the peg in"),
    ),
    _precise(
        "stick-push",
        "stick",
        _STICK,
        0.1,
        ("push the bottle with the stick", "take the stick to the bottle", "use the stick"),
    ),
)
# The same of the precise ones.
PRECISE_TASKS: Mapping[str, Task] = MappingProxyType({task.name: task for task in _PRECISE})
# What --tasks takes for all of them.
PRECISE = "precise"
# The precise tasks in pictures, named and called for with this behind.
PICTURES = "-pictures"
PICTURE_TASKS: Mapping[str, Task] = MappingProxyType(
    {
        f"{task.name}{PICTURES}": replace(
            task,
            name=f"{task.name}{PICTURES}",
            scene=f"{task.scene}{PICTURES}",
            camera=CAMERA,
            hand_camera=True,
            marker=task.scene == "puck",
        )
        for task in _PRECISE
    }
)
_ALL = {**TASKS, **PRECISE_TASKS, **PICTURE_TASKS}


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        QvlaError: there is none; the message lists the names.
    """
    if name not in _ALL:
        raise QvlaError(f"no task is called {name!r}; choose from {', '.join(_ALL)}")
    return _ALL[name]


def draw_placement(task: Task, random: np.random.Generator) -> NDArray[np.float64]:
    """Draw where an episode's object (and goal) is put, metres.  float64 [3 or 6]

    Placements with object and goal closer than `task.apart` are rejected here: Meta-World would
    draw again itself, and with a seeded, frozen placement for ever.

    Raises:
        QvlaError: next to none of the task's placements is far enough apart.
    """
    for _ in range(_REJECTIONS):
        placement: NDArray[np.float64] = random.uniform(*task.placement)
        if not task.apart or np.linalg.norm(placement[:2] - placement[3:5]) >= task.apart:
            return placement
    raise QvlaError(
        f"no placement of {task.name} in {_REJECTIONS} draws had object and goal {task.apart} m "
        f"apart; widen {task.placement} or lower `apart`"
    )


def choose_tasks(names: str | None) -> tuple[str, ...]:
    """Return the tasks named in a comma-separated text; None names the eight of large objects.

    "precise" names the six precise ones as object state, "precise-pictures" in pictures.

    Raises:
        QvlaError: a name is unknown.
    """
    if names is None:
        return tuple(TASKS)
    if names.strip() == PRECISE:
        return tuple(PRECISE_TASKS)
    if names.strip() == PRECISE + PICTURES:
        return tuple(PICTURE_TASKS)
    return tuple(find_task(name.strip()).name for name in names.split(","))


def scene_siblings(task: Task) -> tuple[Task, ...]:
    """Return the other tasks that share the task's scene (the wrong-instruction control)."""
    return tuple(other for other in _ALL.values() if other.scene == task.scene and other != task)
