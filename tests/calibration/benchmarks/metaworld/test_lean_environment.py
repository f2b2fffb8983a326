"""What is left out of Meta-World is read by nobody: states and success are its own."""

import numpy as np
import pytest

from calibration.benchmarks.metaworld import simulator as module
from calibration.benchmarks.metaworld.experts import Expert
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import PRECISE_TASKS, TASKS, find_task

# Orientations in Meta-World's full state, of this moment and the one before.
_ORIENTATIONS = np.r_[7:11, 14:18, 25:29, 32:36]


def trace(name: str, seed: int) -> list[tuple[list[float], bool, tuple[bool, ...]]]:
    """Full state without orientations, success and touch after every step of an expert's."""
    steps = []
    with Simulator(find_task(name)) as simulator:
        expert = Expert(simulator.task)
        simulator.reset(seed)
        touch = simulator._environment.touching_object
        geoms = range(simulator._environment.model.ngeom)
        while not simulator.done:
            simulator.step(expert.act(simulator.full_state))
            state = np.delete(simulator.full_state, _ORIENTATIONS)
            touched = tuple(bool(touch(geom)) for geom in geoms) if simulator.steps % 8 == 0 else ()
            steps.append((state.tolist(), simulator.success, touched))
    return steps


def same_as_whole(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lean = trace(name, seed)
    with monkeypatch.context() as patch:
        patch.setattr(module, "make_lean", lambda _: None)
        whole = trace(name, seed)
    assert lean == whole
    if name in ("stick-push", "pick-place"):
        assert any(any(touched) for _, _, touched in lean), "something is grasped on the way"


@pytest.mark.parametrize("name", ["stick-push", "drawer-open"])
def test_a_lean_environment_is_the_whole_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    same_as_whole(name, 3, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PRECISE_TASKS, *TASKS])
def test_every_lean_environment_is_the_whole_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in range(4):
        same_as_whole(name, seed, monkeypatch)
