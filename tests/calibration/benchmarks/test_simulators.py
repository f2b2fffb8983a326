"""LIBERO's and ALOHA's tasks as far as they can be tried without their packages."""

import importlib.util
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from echo_policy import OFT, OPENVLA, EchoPolicy
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from calibration.benchmarks.aloha.transfer_cube import AlohaTask
from calibration.benchmarks.episode import run_episode
from calibration.benchmarks.episode_progress import EpisodeProgress, require_action
from calibration.benchmarks.evaluation import Evaluation, RolloutConfig, load_evaluation
from calibration.benchmarks.evaluation_lines import evaluation_lines
from calibration.benchmarks.libero.initial_states import load_initial_states
from calibration.benchmarks.libero.libero_simulator import axis_angle, libero_state
from calibration.benchmarks.libero.libero_tasks import SUITES, LiberoTask
from calibration.benchmarks.metaworld.roll_forward import Ahead
from calibration.benchmarks.metaworld.shifts import Shift
from calibration.benchmarks.simulators import (
    BenchmarkTask,
    choose_benchmark_tasks,
    find_benchmark_task,
    open_simulator,
    version_doubts,
)
from qvla_export.pipeline.benchmarks.benchmark_policy import BenchmarkPolicySource
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactError, InvalidObservation, QvlaError
from qvla_export.shared.observation import Observation

LIBERO = "libero_object/3"


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_s_name_stands_for_its_tasks(suite: str) -> None:
    count, steps = SUITES[suite]
    names = choose_benchmark_tasks(suite)
    assert len(names) == count and names[-1] == f"{suite}/{count - 1}"
    assert find_benchmark_task(names[0]).steps == steps
    assert find_benchmark_task(f"{suite}_with_mug/3").steps == steps
    assert choose_benchmark_tasks(f"{suite}-fast, push")[-2:] == (
        f"{suite}-fast/{count - 1}",
        "push",
    )


def test_names_of_other_simulators_are_told_apart() -> None:
    assert find_benchmark_task("libero_object-fast/3") == LiberoTask("libero_object", 3, True)
    assert find_benchmark_task("libero_object-fast/3").name == "libero_object-fast/3"
    assert find_benchmark_task("aloha-transfer-cube") == AlohaTask()
    assert choose_benchmark_tasks("precise")[0] == "pick-place"
    for wrong in ("libero_object/10", "libero_90/90", "libero_object/x", "libero/1", "aloha"):
        with pytest.raises(QvlaError, match="no task is called"):
            choose_benchmark_tasks(wrong)


def test_what_a_simulator_does_not_do_is_refused() -> None:
    assert RolloutConfig((LIBERO,), 1, gripper="robosuite").runnable().tasks == (LIBERO,)
    with pytest.raises(QvlaError, match=r"--gripper robosuite for 0 closed and 1 open"):
        RolloutConfig((LIBERO,), 1)
    with pytest.raises(QvlaError, match=r"--gripper is for LIBERO's tasks"):
        RolloutConfig(("push",), 1, gripper="as-is")
    changes: dict[str, dict[str, Any]] = {
        "the shift start:1": {"shift": "start:1"},
        "the control wrong-instruction": {"control": "wrong-instruction"},
        "live": {"live": True},
        "a delay of 2 steps": {"delay_steps": 2},
        "roll-forward": {"roll_forward": True},
        "seams within 3 mm": {"seam_limit_mm": 3.0},
    }
    for what, change in changes.items():
        with pytest.raises(QvlaError, match=rf"{what}.*only Meta-World's tasks.*{LIBERO}"):
            RolloutConfig((LIBERO,), 1, gripper="as-is", **change)


@pytest.mark.parametrize(
    ("name", "package"), [(LIBERO, "libero"), ("aloha-transfer-cube", "gym_aloha")]
)
def test_without_its_package_a_simulator_says_how_to_get_it(name: str, package: str) -> None:
    if importlib.util.find_spec(package) is not None:
        pytest.skip(f"{package} is installed here")
    with pytest.raises(
        QvlaError, match=r"environment of its own|environment of their own"
    ) as error:
        open_simulator(find_benchmark_task(name))
    assert "make simulators-env" in str(error.value)


STATES = np.random.default_rng(0).normal(size=(5, 9))


@pytest.mark.parametrize("form", ["npz", "torch", "tensor"])
def test_initial_states_come_from_either_form(tmp_path: Path, form: str) -> None:
    path = tmp_path / "task.pruned_init"
    if form == "npz":
        np.savez_compressed(path.with_name(f"{path.name}.npz"), states=STATES)
    else:
        torch.save(STATES if form == "torch" else torch.from_numpy(STATES), path)
    read = load_initial_states(path)
    assert read.dtype == np.float64
    np.testing.assert_array_equal(read, STATES)


class _Harmful:
    def __reduce__(self) -> Any:
        return (print, ("it was run",))


@pytest.mark.parametrize(
    "content",
    [
        _Harmful(),
        np.array([_Harmful()], object),
        {"states": [_Harmful()]},
        np.zeros((2, 3), np.int64),
        np.zeros(3),
        np.zeros((0, 3)),
        np.full((2, 3), np.nan),
    ],
    ids=["global", "object array", "nested", "integers", "vector", "none", "NaN"],
)
def test_initial_states_are_numbers_and_run_nothing(
    tmp_path: Path, content: object, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "task.pruned_init"
    torch.save(content, path)
    with pytest.raises(ArtifactError, match=r"task\.pruned_init"):
        load_initial_states(path)
    archive = tmp_path / "other.pruned_init.npz"
    np.savez(
        archive, states=np.asarray(content, object if not isinstance(content, np.ndarray) else None)
    )
    with pytest.raises(ArtifactError):
        load_initial_states(tmp_path / "other.pruned_init")
    assert "it was run" not in capsys.readouterr().out


@pytest.mark.parametrize("bytes_", [b"", b"PK\x03\x04", pickle.dumps(STATES), b"x" * 100])
def test_damaged_initial_states_have_a_reason(tmp_path: Path, bytes_: bytes) -> None:
    path = tmp_path / "task.pruned_init"
    with pytest.raises(ArtifactError, match="install the benchmark anew"):
        load_initial_states(path)
    path.write_bytes(bytes_)
    (tmp_path / "other.pruned_init.npz").write_bytes(bytes_)
    for name in ("task.pruned_init", "other.pruned_init"):
        with pytest.raises(ArtifactError, match="install the benchmark anew"):
            load_initial_states(tmp_path / name)


def test_the_state_is_openvla_s() -> None:
    turns = Rotation.random(20, random_state=0)
    for turn in turns:
        quaternion = turn.as_quat()
        quaternion *= np.sign(quaternion[3])
        np.testing.assert_allclose(axis_angle(quaternion), turn.as_rotvec(), atol=1e-12)
        # As upstream: the same turn the other way about, by a whole turn less.
        other = axis_angle(-quaternion)
        assert np.linalg.norm(other) == pytest.approx(2 * np.pi - np.linalg.norm(turn.as_rotvec()))
    assert axis_angle(np.array([0.0, 0, 0, 1])).tolist() == [0, 0, 0]
    assert axis_angle(np.array([0.0, 0, 0, 1.0000001])).tolist() == [0, 0, 0]
    half = np.array([1.0, 0, 0, 0])
    seen = {"robot0_eef_pos": np.arange(3.0), "robot0_eef_quat": half}
    state = libero_state({**seen, "robot0_gripper_qpos": np.array([0.02, -0.02])})
    assert state.dtype == np.float32
    np.testing.assert_allclose(state, [0, 1, 2, np.pi, 0, 0, 0.02, -0.02], rtol=1e-6)


def test_other_versions_are_doubted() -> None:
    fitting = {"robosuite": "1.4.0", "mujoco": "3.3.0"}
    assert version_doubts([LIBERO], fitting) == []
    (doubt,) = version_doubts([LIBERO], {"robosuite": "1.4.1", "mujoco": "3.4.0"})
    assert doubt.startswith("mujoco 3.4.0: ")
    assert len(version_doubts([LIBERO], {"robosuite": "1.5.1", "mujoco": "3.10.0"})) == 2
    assert version_doubts(["push"], {"mujoco": "3.4.0"}) == []


def seen_by(cameras: tuple[str, ...]) -> Observation:
    images = {name: np.full((4, 5, 3), i + 1, np.uint8) for i, name in enumerate(cameras)}
    return Observation(images, "push", np.zeros(8, np.float32))


def test_a_policy_sees_a_benchmark_by_its_own_names() -> None:
    both = seen_by(("image", "wrist_image"))
    for contract in (OFT, OPENVLA):
        policy = BenchmarkPolicySource(partial(EchoPolicy, contract))()
        chunk = policy.infer(both)
        assert chunk.actions.shape == (4, 7) and chunk.actions[0, 0] == 1
    with pytest.raises(InvalidObservation, match="missing"):
        BenchmarkPolicySource(partial(EchoPolicy, OFT))().infer(seen_by(("image",)))
    turned = BenchmarkPolicySource(partial(EchoPolicy, OFT), "robosuite")().infer(both)
    assert turned.actions[:, -1].tolist() == [1.0] * 4
    assert turned.normalized[:, -1].tolist() == [0.0] * 4


class Still(EpisodeProgress[BenchmarkTask]):
    """A simulator without physics: the hand goes where it is told, six steps an episode."""

    def __init__(self, task: BenchmarkTask, dimensions: int) -> None:
        super().__init__(task)
        self.dimensions = dimensions
        self.hand: NDArray[np.float64] = np.zeros(3)

    @property
    def done(self) -> bool:
        return self.steps >= 6

    def reset(
        self, seed: int, instruction: str | None = None, shift: Shift | None = None
    ) -> Observation:
        self._refuse_changes(instruction, shift)
        self._begin()
        self.hand = np.zeros(3)
        return self.observe()

    def step(self, action: NDArray[np.float32]) -> bool:
        require_action(action, self.dimensions)
        self.hand = self.hand + 0.05 * action[:3]
        return self._count_step(False)

    def observe(self, ahead: Ahead | None = None) -> Observation:
        return seen_by(("image",))

    def close(self) -> None: ...


@dataclass
class Constant:
    actions: NDArray[np.float32]

    def infer(self, observation: Observation) -> ActionChunk:
        return ActionChunk(self.actions, self.actions)


def test_an_episode_is_counted_and_its_actions_are_looked_at() -> None:
    simulator = Still(find_benchmark_task(LIBERO), 7)
    simulator.reset(0)
    assert simulator.goal_distance_m == float("inf")
    for wrong in (np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan), np.full(7, np.inf)):
        with pytest.raises(QvlaError, match="an action is 7 finite numbers, got"):
            simulator.step(wrong.astype(np.float32))
    simulator.step(np.zeros(7, np.float32))
    assert (simulator.steps, simulator.success) == (1, False)
    for instruction, shift in (("push", None), (None, Shift("start", 1))):
        with pytest.raises(QvlaError, match=rf"{LIBERO} is run as it is: without shift"):
            simulator.reset(0, instruction, shift)
    assert simulator.steps == 1
    simulator.reset(0)
    assert simulator.steps == 0


def test_episodes_of_other_simulators_are_measured_as_they_can_be(tmp_path: Path) -> None:
    actions = np.zeros((3, 7), np.float32)
    actions[:, 0], actions[:, 3] = (0.0, 0.0, 1.0), 9.0  # a turn of the wrist, no gripper
    actions[:, 6] = (1.0, -1.0, 1.0)
    config = RolloutConfig((LIBERO,), 1, execute=3, gripper="as-is")
    simulator = Still(find_benchmark_task(LIBERO), 7)
    result = run_episode(simulator, Constant(actions), config, 1_000_000)
    assert result.motion is not None and result.motion.gripper_flips == 4
    assert result.motion.seam_jumps_mm == pytest.approx((50.0,))
    versions = {"robosuite": "1.5.0"}
    fast = Evaluation("p", "d", config, (result,), versions)
    fast.save(tmp_path / "libero.json")
    assert load_evaluation(tmp_path / "libero.json") == fast
    assert fast.solved_per_hour() == 0.0
    assert any("warning: robosuite 1.5.0" in line for line in evaluation_lines(fast, tmp_path))
    cube = RolloutConfig(("aloha-transfer-cube",), 1, execute=3)
    joints = np.full((3, 14), 2.0, np.float32)
    still = Still(AlohaTask(), 14)
    arms = run_episode(still, Constant(joints), cube, 0)
    assert arms.motion is None and arms.steps == 6
    lines = list(evaluation_lines(Evaluation("p", "d", cube, (arms,), {}), tmp_path))
    assert any("aloha-transfer-cube: 0%" in line for line in lines)
