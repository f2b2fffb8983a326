"""The simulator's promises: seeds, scenes, actions, and tasks that need eyes."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from places import ROOT

from calibration.benchmarks.metaworld.experts import Expert, solve
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import CAMERA, TASKS, Task, find_task, scene_siblings
from qvla_export.shared.errors import QvlaError

PAIRS = [(task, other) for task in TASKS.values() for other in scene_siblings(task)]


@pytest.fixture
def drawer() -> Iterator[Simulator]:
    with Simulator(find_task("drawer-open")) as simulator:
        yield simulator


def test_there_are_six_tasks_and_two_shared_scenes() -> None:
    assert len(TASKS) >= 6
    assert len({task.scene for task in TASKS.values() if scene_siblings(task)}) >= 2


def test_no_phrase_names_two_tasks() -> None:
    phrases = [phrase for task in TASKS.values() for phrase in task.instructions]
    assert len(phrases) == len(set(phrases))
    assert all(len(task.instructions) >= 3 for task in TASKS.values())
    assert all(task.instruction == task.instructions[0] for task in TASKS.values())


@pytest.mark.parametrize(("task", "other"), PAIRS, ids=lambda task: task.name)
def test_only_the_instruction_tells_siblings_apart(task: Task, other: Task) -> None:
    assert task in scene_siblings(other)
    with Simulator(task) as simulator, Simulator(other) as sibling:
        for seed in range(3):
            here, there = simulator.reset(seed), sibling.reset(seed)
            assert here.images[CAMERA].tobytes() == there.images[CAMERA].tobytes()
            assert here.state.tolist() == there.state.tolist()
            assert here.instruction != there.instruction


@pytest.mark.parametrize(("task", "other"), PAIRS, ids=lambda task: task.name)
def test_obeying_the_wrong_instruction_solves_nothing(task: Task, other: Task) -> None:
    expert = Expert(other)
    solved = []
    with Simulator(task) as simulator, Simulator(other) as sibling:
        for seed in range(10):
            simulator.reset(seed)
            sibling.reset(seed)
            while not sibling.done:
                action = expert.act(sibling.full_state)
                sibling.step(action)
                simulator.step(action)
            assert sibling.success
            solved.append(simulator.success)
    assert np.mean(solved) <= 0.1


def test_unknown_task_is_refused_with_the_names() -> None:
    with pytest.raises(QvlaError, match=r"'make-coffee'; choose from drawer-open, drawer-close"):
        find_task("make-coffee")


def test_a_seed_is_an_episode_to_the_byte_whatever_came_before(drawer: Simulator) -> None:
    def play(simulator: Simulator, seed: int) -> tuple[bytes, bytes, list[float]]:
        first = simulator.reset(seed)
        random = np.random.default_rng(seed)
        for _ in range(12):
            simulator.step(random.uniform(-1, 1, 4).astype(np.float32))
        last = simulator.observe()
        return first.images[CAMERA].tobytes(), last.images[CAMERA].tobytes(), last.state.tolist()

    fresh = play(drawer, 5)
    play(drawer, 6)
    assert play(drawer, 5) == fresh
    assert play(drawer, 6) != fresh
    with Simulator(drawer.task) as another:
        assert play(another, 5) == fresh


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_waiting_solves_nothing(task: Task) -> None:
    with Simulator(task) as simulator:
        for seed in range(10):
            simulator.reset(seed)
            for _ in range(10):
                simulator.step(np.zeros(4, dtype=np.float32))
            assert not simulator.success


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_the_expert_succeeds_and_needs_to_see(task: Task) -> None:
    expert = Expert(task)
    middle = np.mean(task.placement, axis=0)[:3]
    with Simulator(task) as simulator:
        seeing = [solve(simulator, expert, seed) for seed in range(20)]
        blind = [solve(simulator, expert, seed, middle) for seed in range(20)]
    assert np.mean(seeing) >= 0.95
    assert np.mean(blind) <= 0.35


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_a_localization_error_of_15_mm_is_forgiven(task: Task) -> None:
    expert = Expert(task)
    with Simulator(task) as simulator:
        solved = []
        for seed in range(10):
            angle = np.random.default_rng(seed).uniform(0, 2 * np.pi)
            simulator.reset(seed)
            error = 0.015 * np.array([np.cos(angle), np.sin(angle), 0.0])
            solved.append(solve(simulator, expert, seed, simulator.placement[:3] + error))
    assert np.mean(solved) >= 0.9


@pytest.mark.parametrize("size", [28, 84, 120])
def test_observations_keep_the_contract(size: int) -> None:
    with Simulator(find_task("handle-press"), size) as simulator:
        observation = simulator.reset(0, "do something else")
    assert observation.images[CAMERA].shape == (size, size, 3)
    assert observation.images[CAMERA].std() > 10
    assert observation.state.shape == (4,)
    assert observation.state.dtype == np.float32
    assert 0 <= observation.state[3] <= 1
    assert observation.instruction == "do something else"


def test_actions_are_clipped_as_the_robot_would(drawer: Simulator) -> None:
    states = []
    for scale in (1.0, 7.0):
        drawer.reset(1)
        for _ in range(5):
            drawer.step(np.array([-scale, scale, scale, scale], dtype=np.float32))
        states.append(drawer.state.tolist())
    assert states[0] == states[1]


@pytest.mark.parametrize("action", [[0.0] * 3, [0.0, 0.0, 0.0, float("nan")], [[0.0] * 4]])
def test_an_action_that_is_none_is_refused(drawer: Simulator, action: list[float]) -> None:
    drawer.reset(0)
    with pytest.raises(QvlaError, match="an action is 4 finite numbers"):
        drawer.step(np.array(action, dtype=np.float32))


def test_an_episode_ends_at_its_limit(drawer: Simulator) -> None:
    drawer.reset(0)
    while not drawer.done:
        assert not drawer.step(np.zeros(4, dtype=np.float32))
    assert drawer.steps == drawer.task.steps
    drawer.reset(0)
    assert (drawer.steps, drawer.success, drawer.done) == (0, False, False)


def test_success_stays_once_reached(drawer: Simulator) -> None:
    expert = Expert(drawer.task)
    assert solve(drawer, expert, 3)
    steps = drawer.steps
    assert drawer.step(np.array([0.0, 1.0, 0.0, -1.0], dtype=np.float32))
    assert drawer.steps == steps + 1
    assert drawer.done


def test_closing_twice_is_harmless() -> None:
    simulator = Simulator(find_task("drawer-open"))
    simulator.reset(0)
    simulator.close()
    simulator.close()


def test_a_machine_without_opengl_is_told_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "OpenGL").mkdir()
    (tmp_path / "OpenGL/__init__.py").write_text("raise ImportError('no EGL library')")
    code = (
        "from calibration.benchmarks.metaworld.simulator import Simulator\n"
        "from calibration.benchmarks.metaworld.tasks import find_task\n"
        "from qvla_export.shared.errors import QvlaError\n"
        "try:\n"
        "    Simulator(find_task('drawer-open')).reset(0)\n"
        "except QvlaError as error:\n"
        "    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment.pop("MUJOCO_GL", None)
    environment.pop("PYOPENGL_PLATFORM", None)
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "cannot draw with MUJOCO_GL=egl (no EGL library)" in run.stdout
    assert "apt-get install libegl1" in run.stdout
