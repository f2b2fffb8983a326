"""Shifts: what an evaluation changes of the scenes a policy was trained on, and by how much."""

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from calibration.benchmarks.metaworld.object_state import OBJECT_STATE
from calibration.benchmarks.metaworld.tasks import PICTURES, Bounds, Task
from qvla_export.shared.errors import QvlaError

Vector = NDArray[np.float64]

GRADES: Final = (1, 2, 3)
# What a shift changes, in words.
KINDS: Mapping[str, str] = MappingProxyType(
    {
        "start": "the hand starts 3, 6 or 9 cm away from where it would have",
        "placement": "objects lie at the edge of their range, at 3 beyond it",
        "instruction": "said otherwise: another trained phrasing, with more words, in new words",
        "noise": "pixels or positions are off by noise",
        "distractors": "other things lie about",
        "camera": "the camera stands elsewhere",
        "light": "the scene is darker or brighter",
        "colour": "things have other colours, at 3 no textures",
    }
)
# Means nothing where no picture is drawn.
_PICTURES_ONLY = ("camera", "light", "colour")
# Each episode has one of those that apply to its task, in turn.
MIXED: Final = "mixed"
NO_SHIFT: Final = "none"

# Tasks whose object state has two things already.
_TWO_THINGS = ("stick-push",)

# Grade 1, 2, 3: how far away the hand starts, metres.
_START = (0.03, 0.06, 0.09)
# Where the hand may then be: low and high corner, metres.
_REACH: Bounds = ((-0.3, 0.4, 0.08), (0.3, 0.8, 0.35))
# From which share of the way between middle and edge on objects are put, and up to which.
_EDGE = ((0.7, 1.0), (0.9, 1.0), (1.0, 1.1))
# Standard deviations: of pixels, of what an episode shows all positions off by and of what each
# look adds, metres.
_PIXELS = (4.0, 8.0, 12.0)
_OFF = (0.002, 0.004, 0.008)
_TREMBLE = (0.0005, 0.001, 0.002)
# How far from the object the one distractor is that an object state has room for, metres.
_NEAR = (0.3, 0.15, 0.08)
_REJECTIONS = 1000

# In words that no demonstration has; before them, more words around the trained ones.
_POLITE = "please go ahead and {}, thank you"
_NEW_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "drawer-open": "get the drawer to stand open",
        "drawer-close": "make sure that the drawer is closed",
        "window-open": "let some air in through the window",
        "window-close": "no more draught: window closed, please",
        "faucet-open": "let the water run",
        "faucet-close": "stop the water",
        "button-press-topdown": "give the red button a tap from the top",
        "handle-press": "lean on the handle until it is down",
        "pick-place": "hold the puck up where the marker hovers",
        "push": "move the puck along the table until it lies below the marker",
        "assembly": "thread the ring onto the upright peg",
        "hand-insert": "drop the block in the hole",
        "peg-insert-side": "stick the peg into the opening of the box",
        "stick-push": "with the stick, shove the bottle along",
    }
)


@dataclass(frozen=True)
class Shift:
    """One change of an episode, from hardly noticeable (grade 1) to hard (3).

    Equal seeds change a task's episodes equally, whichever policy plays; the grade scales one
    and the same draw.

    Raises:
        QvlaError: no such kind or grade.
    """

    kind: str
    grade: int

    def __post_init__(self) -> None:
        if self.kind not in KINDS or self.grade not in GRADES:
            raise QvlaError(
                f"a shift is NAME:GRADE, with a name of {', '.join((*KINDS, MIXED))} and a grade "
                f"of {', '.join(map(str, GRADES))}, got {self}"
            )

    def __str__(self) -> str:
        return f"{self.kind}:{self.grade}"

    def draws(self, seed: int) -> np.random.Generator:
        """Return the source of an episode's draws."""
        return np.random.default_rng((seed, zlib.crc32(self.kind.encode())))

    def of(self, grades: tuple[float, ...]) -> float:
        """Return the value of this grade."""
        return grades[self.grade - 1]


def applies_to(kind: str, task: Task) -> bool:
    """Say whether a shift can be seen in a task at all.

    An object state has no camera, light or colours, and in a scene of two things no room for a
    distractor.
    """
    if task.camera != OBJECT_STATE:
        return True
    return kind not in _PICTURES_ONLY and not (kind == "distractors" and task.name in _TWO_THINGS)


def parse_shift(text: str) -> tuple[str, int] | None:
    """Read "NAME:GRADE" or "none"; return name and grade.

    Raises:
        QvlaError: no such shift.
    """
    if text == NO_SHIFT:
        return None
    name, _, grade = text.partition(":")
    number = int(grade) if grade.isdigit() else 0
    Shift("start" if name == MIXED else name, number)  # refuses what is none
    return name, number


def shift_fits(text: str, task: Task) -> bool:
    """Say whether an evaluation's shift can be tried on a task."""
    parsed = parse_shift(text)
    return parsed is None or parsed[0] == MIXED or applies_to(parsed[0], task)


def shift_of(text: str, task: Task, seed: int) -> Shift | None:
    """Return the shift of one episode of an evaluation.

    Args:
        text: the evaluation's, as `parse_shift` reads it.
        task: the episode's.
        seed: the episode's; under "mixed" it says which of the shifts that apply.

    Raises:
        QvlaError: the shift does not apply to the task.
    """
    parsed = parse_shift(text)
    if parsed is None:
        return None
    name, grade = parsed
    if name == MIXED:
        kinds = [kind for kind in KINDS if applies_to(kind, task)]
        name = kinds[seed % len(kinds)]
    if not applies_to(name, task):
        raise QvlaError(f"{name} cannot be shifted in {task.name}: it is shown as object state")
    return Shift(name, grade)


def shifted_placement(shift: Shift, task: Task, placement: Vector, seed: int) -> Vector:
    """Return an episode's placement at the edge of the task's range, metres.  float64 [3 or 6]

    Raises:
        QvlaError: no draw has object and goal as far apart as the task needs them.
    """
    low, high = (np.array(corner) for corner in task.placement)
    middle, half = (low + high) / 2, (high - low) / 2
    least, most = _EDGE[shift.grade - 1]
    draws = shift.draws(seed)
    sides = np.where(placement < middle, -1.0, 1.0)
    for _ in range(_REJECTIONS):
        share = least + (most - least) * draws.uniform(size=len(placement))
        edge: Vector = middle + sides * share * half
        # What lies on the table stays at its height.
        edge[2::3] = np.clip(edge[2::3], low[2::3], high[2::3])
        if not task.apart or np.linalg.norm(edge[:2] - edge[3:5]) >= task.apart:
            return edge
        sides = draws.choice((-1.0, 1.0), len(placement))
    raise QvlaError(f"no placement at the edge of {task.name} has object and goal apart")


def shifted_start(shift: Shift, hand: Vector, seed: int) -> Vector:
    """Return where the hand starts, metres.  float64 [3]"""
    direction = shift.draws(seed).normal(size=3)
    away = shift.of(_START) * direction / np.linalg.norm(direction)
    return np.clip(hand + away, *_REACH)


def shifted_instruction(shift: Shift, task: Task, instruction: str, seed: int) -> str:
    """Return the instruction in other words; one that is not the task's own is left as it is."""
    if instruction != task.instruction:
        return instruction
    if shift.grade == 1:
        return str(shift.draws(seed).choice(task.instructions[1:]))
    return (
        _POLITE.format(instruction)
        if shift.grade == 2
        else _NEW_WORDS[task.name.removesuffix(PICTURES)]
    )


def shifted_pixels(
    shift: Shift, image: NDArray[np.uint8], seed: int, look: int
) -> NDArray[np.uint8]:
    """Return a picture with noise in every pixel.

    Args:
        shift: of noise.
        image: uint8 [height, width, 3].
        seed: the episode's.
        look: number of the control step at which it is seen.
    """
    noise = shift.draws(seed + (look << 40)).normal(0.0, shift.of(_PIXELS), image.shape)
    noisy: NDArray[np.uint8] = np.rint(np.clip(image + noise, 0, 255)).astype(np.uint8)
    return noisy


def shifted_positions(shift: Shift, seed: int, look: int) -> NDArray[np.float64]:
    """Return what first thing, second thing and goal are shown off by, metres.  float64 [3, 3]"""
    off = shift.draws(seed).normal(0.0, shift.of(_OFF), (3, 3))
    tremble = shift.draws(seed + (look << 40)).normal(0.0, shift.of(_TREMBLE), (3, 3))
    return off + tremble


def distractor(shift: Shift, placement: Vector, seed: int) -> Vector:
    """Return where the distractor of an object state lies, metres.  float64 [3]"""
    angle = shift.draws(seed).uniform(0.0, 2 * np.pi)
    away = shift.of(_NEAR) * np.array([np.cos(angle), np.sin(angle), 0.0])
    return placement[:3] + away
