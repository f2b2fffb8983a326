"""The noun `LiberoTask`: one task of a suite, by a name that means the same without the package."""

import re
from dataclasses import dataclass

# Suite -> its tasks and the control steps of an episode; of OpenVLA's evaluation (longest
# demonstration and some). Source: openvla `experiments/robot/libero/run_libero_eval.py`.
SUITES = {
    "libero_spatial": (10, 220),
    "libero_object": (10, 280),
    "libero_goal": (10, 300),
    "libero_10": (10, 520),
    "libero_90": (90, 400),
}
_MOST_STEPS = max(steps for _, steps in SUITES.values())
# Behind a suite's name: only what collides is drawn, in one colour a thing.
FAST = "-fast"
_SUITE = re.compile(r"(libero_[a-z0-9_]+?)(-fast)?")
_NAME = re.compile(_SUITE.pattern + r"/(\d{1,3})")


@dataclass(frozen=True)
class LiberoTask:
    """One task of LIBERO, or of a suite that was made after it."""

    suite: str
    # Its place in the suite, from 0.
    index: int
    # Whether it is drawn fast: for training and for trying things out, never for figures.
    fast: bool = False

    @property
    def name(self) -> str:
        """Its suite and place, as "libero_object/3"."""
        return f"{self.suite}{FAST if self.fast else ''}/{self.index}"

    @property
    def scene(self) -> str:
        """Tasks of one scene are put in the same places by the same seed: here none are."""
        return self.name

    @property
    def steps(self) -> int:
        """Episode limit, control steps; of another suite that of the one whose name it extends."""
        bases = [name for name in SUITES if f"{self.suite}_".startswith(f"{name}_")]
        return SUITES[max(bases, key=len)][1] if bases else _MOST_STEPS

    @property
    def control_hz(self) -> int:
        """Control steps a second."""
        return 20

    @property
    def unit_mm(self) -> float:
        """How far an action of 1 moves the hand, mm (robosuite's OSC_POSE)."""
        return 50.0


def libero_task(name: str) -> LiberoTask | None:
    """Return the task that a name means; None where it is no LIBERO task's."""
    match = _NAME.fullmatch(name)
    if match is None or int(match[3]) >= SUITES.get(match[1], (1000, 0))[0]:
        return None
    return LiberoTask(match[1], int(match[3]), match[2] is not None)


def suite_tasks(name: str) -> tuple[str, ...]:
    """Return the names of a suite's tasks; none where it is no standard suite's name."""
    match = _SUITE.fullmatch(name)
    count = SUITES[match[1]][0] if match and match[1] in SUITES else 0
    return tuple(f"{name}/{index}" for index in range(count))
