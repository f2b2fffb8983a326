"""LIBERO itself, in its environment: make simulators."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from openvla_cases import write_tiny_openvla
from pi_cases import write_tiny_pi
from places import ROOT
from simulator_marks import simulator_marks
from tiny_policy import TINY_CONFIG, TINY_INSTRUCTIONS, TINY_SIZE

from calibration.benchmarks.episode import run_episode
from calibration.benchmarks.evaluation import RolloutConfig
from calibration.benchmarks.libero.initial_states import load_initial_states
from calibration.benchmarks.libero.libero_expert import LiberoExpert
from calibration.benchmarks.libero.libero_simulator import (
    LiberoSimulator,
    axis_angle,
    find_libero,
)
from calibration.benchmarks.libero.libero_tasks import SUITES, LiberoTask, suite_tasks
from calibration.benchmarks.simulators import find_benchmark_task, simulator_versions
from qvla_export.policies.oft.new_checkpoint import new_module, save_checkpoint
from qvla_export.policies.prismatic.new_checkpoint import train_tokenizer
from qvla_export.shared.action import ActionChunk, Gripper
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

pytestmark = simulator_marks("libero", "LIBERO")
# Of each of libero_object's ten tasks.
EPISODES = int(os.environ.get("QVLA_LIBERO_EPISODES", "2"))


def task_of(name: str) -> LiberoTask:
    task = find_benchmark_task(name)
    assert isinstance(task, LiberoTask)
    return task


@pytest.mark.parametrize("suite", SUITES)
def test_every_task_has_words_a_scene_and_fifty_states(suite: str) -> None:
    found = [find_libero(task_of(name)) for name in suite_tasks(suite)]
    assert len({task.language for task in found}) == len(found) or suite == "libero_90"
    for task in found:
        assert task.language and task.scene.is_file()
        assert len(load_initial_states(task.states)) == 50


def test_what_the_package_does_not_have_is_named() -> None:
    with pytest.raises(QvlaError, match=r"no suite 'libero_strange'; it has .*libero_object"):
        find_libero(LiberoTask("libero_strange", 0))
    with pytest.raises(QvlaError, match=r"libero_object_with_mug has 10 tasks"):
        find_libero(LiberoTask("libero_object_with_mug", 10))
    assert simulator_versions(["libero_object/0"])["robosuite"] == "1.4.0"


# The second has things that no initial state places: a stove, a cabinet, a rack.
@pytest.mark.parametrize("name", ["libero_object/0", "libero_goal/0"])
def test_observations_are_those_of_openvla_s_evaluation(name: str) -> None:
    from libero.libero.envs import OffScreenRenderEnv
    from robosuite.utils.transform_utils import quat2axisangle

    task = task_of(name)
    moves = np.random.default_rng(0).uniform(-1, 1, (5, 7)).astype(np.float32)
    simulator = LiberoSimulator(task)
    expected = [simulator.reset(1_000_003)]
    for move in moves:
        simulator.step(move)
    expected.append(simulator.observe())
    simulator.close()
    found = find_libero(task)
    theirs = OffScreenRenderEnv(
        bddl_file_name=str(found.scene), camera_heights=256, camera_widths=256
    )
    theirs.seed(0)
    theirs.reset()
    theirs.set_init_state(load_initial_states(found.states)[3])
    settled = [theirs.step([0.0] * 6 + [-1.0])[0] for _ in range(10)][-1]
    moved = [theirs.step(move.tolist())[0] for move in moves][-1]
    theirs.close()
    for ours, seen in zip(expected, (settled, moved), strict=True):
        for shown, camera in (("image", "agentview"), ("wrist_image", "robot0_eye_in_hand")):
            np.testing.assert_array_equal(ours.images[shown], seen[f"{camera}_image"][::-1, ::-1])
        turn = quat2axisangle(seen["robot0_eef_quat"].copy())
        np.testing.assert_allclose(axis_angle(seen["robot0_eef_quat"]), turn, atol=1e-12)
        parts = seen["robot0_eef_pos"], turn, seen["robot0_gripper_qpos"]
        np.testing.assert_allclose(ours.state, np.concatenate(parts), atol=1e-6)


def test_an_episode_repeats_and_fast_drawing_shows_the_same_world() -> None:
    shown = {}
    for name in ("libero_object/0", "libero_object-fast/0"):
        simulator = LiberoSimulator(task_of(name))
        first = simulator.reset(7)
        simulator.step(np.ones(7, np.float32))
        simulator.reset(8)
        again = simulator.reset(7)
        np.testing.assert_array_equal(first.state, again.state)
        np.testing.assert_array_equal(first.images["image"], again.images["image"])
        shown[name] = again
        simulator.close()
    slow, fast = shown.values()
    np.testing.assert_array_equal(slow.state, fast.state)
    assert (slow.images["image"] != fast.images["image"]).any()
    colours = {tuple(pixel) for pixel in fast.images["image"].reshape(-1, 3)[::7]}
    assert len(colours) > 8


@dataclass
class ExpertPolicy:
    """The expert of a simulator that the test owns, one action a chunk."""

    simulator: LiberoSimulator

    def infer(self, observation: Observation) -> ActionChunk:
        if self.simulator.steps == 0:
            self.expert = LiberoExpert(self.simulator)
        action = self.expert.act()[None]
        return ActionChunk(action, action)


def test_the_expert_solves_libero_object() -> None:
    solved = {}
    names = suite_tasks("libero_object-fast")
    config = RolloutConfig(names, EPISODES, seed=0, execute=1, gripper="as-is")
    for name in names:
        simulator = LiberoSimulator(task_of(name))
        expert = ExpertPolicy(simulator)
        runs = [run_episode(simulator, expert, config, seed) for seed in range(EPISODES)]
        solved[name] = [(run.success, run.steps) for run in runs]
        simulator.close()
    print("libero_object, solved by the expert:", solved)
    assert np.mean([success for runs in solved.values() for success, _ in runs]) >= 0.85


def write_oft(checkpoint: Path) -> Path:
    cameras = ("full_image", "wrist_image")
    config = replace(TINY_CONFIG, cameras=cameras, action_dim=7, state_dim=8, horizon=8)
    tokenizer = train_tokenizer(TINY_INSTRUCTIONS, TINY_SIZE.vocab_size)
    statistics = {}
    for part, size in (("action", 7), ("proprio", 8)):
        statistics[part] = {"q01": [-1.0] * size, "q99": [1.0] * size}
        statistics[part] |= {"min": [-1.0] * size, "max": [1.0] * size}
    statistics["action"]["mask"] = [True] * 7
    module = new_module(TINY_SIZE, config, 0)
    save_checkpoint(checkpoint, module, config, tokenizer, {"libero": statistics}, step=0)
    return checkpoint


# Of two cameras, of one and no state, of openpi's slots: each has names of its own for them.
WRITERS: dict[str, tuple[Callable[[Path], Path], Gripper]] = {
    "oft": (write_oft, "robosuite"),
    "openvla": (write_tiny_openvla, "robosuite"),
    "pi0": (write_tiny_pi, "as-is"),
}


@pytest.mark.parametrize("family", WRITERS)
def test_a_checkpoint_of_any_family_is_evaluated_by_the_command(
    tmp_path: Path, family: str
) -> None:
    write, gripper = WRITERS[family]
    checkpoint = write(tmp_path / "checkpoint")
    output = tmp_path / "evaluation.json"
    words = ["-m", "qvla_export", "evaluate", checkpoint, "--tasks", "libero_object-fast/0"]
    words += ["--episodes", 2, "--gripper", gripper, "--workers", 1, "--output", output]
    command = [sys.executable, *map(str, words)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "drawn fast" in run.stdout and "warning" not in run.stdout
    written = json.loads(output.read_text())
    for episode in written["results"]:
        assert episode["task"] == "libero_object-fast/0" and episode["steps"] in range(1, 281)
    assert [episode["seed"] for episode in written["results"]] == [1_000_000, 1_000_001]
    assert written["versions"]["robosuite"] == "1.4.0"
