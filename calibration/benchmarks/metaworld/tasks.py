"""The language-named tasks: scenes, phrasings and how widely each scene is randomized."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qvla_export.shared.errors import QvlaError

Bounds = tuple[tuple[float, ...], tuple[float, ...]]

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

    @property
    def instruction(self) -> str:
        """The canonical phrasing."""
        return self.instructions[0]


_STEPS = 120
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


def find_task(name: str) -> Task:
    """Return the task of that name.

    Raises:
        QvlaError: there is none; the message lists the names.
    """
    if name not in TASKS:
        raise QvlaError(f"no task is called {name!r}; choose from {', '.join(TASKS)}")
    return TASKS[name]


def scene_siblings(task: Task) -> tuple[Task, ...]:
    """Return the other tasks that share the task's scene (the wrong-instruction control)."""
    return tuple(other for other in TASKS.values() if other.scene == task.scene and other != task)
