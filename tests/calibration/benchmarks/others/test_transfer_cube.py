"""gym-aloha's transfer cube itself, in its environment: make simulators."""

from functools import partial

import numpy as np
import pytest
from echo_policy import EchoPolicy
from simulator_marks import simulator_marks

from calibration.benchmarks.aloha.transfer_cube import AlohaTask, TransferCube
from calibration.benchmarks.episode import run_episode
from calibration.benchmarks.evaluation import RolloutConfig
from jetson.serving.policy_contract import PolicyContract
from qvla_export.pipeline.benchmarks.benchmark_policy import BenchmarkPolicySource
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.observation import Observation

pytestmark = simulator_marks("gym_aloha", "gym-aloha")
ALOHA = PolicyContract(("cam_high",), 50, 14, 14, "aloha", reads=False)


def test_joints_and_pictures_are_gym_aloha_s_own() -> None:
    from gym_aloha.env import AlohaEnv

    simulator = TransferCube()
    ours = simulator.reset(5)
    theirs = AlohaEnv("transfer_cube", obs_type="pixels_agent_pos")
    seen, _ = theirs.reset(seed=5)
    np.testing.assert_allclose(ours.state, seen["agent_pos"], atol=1e-6)
    np.testing.assert_array_equal(ours.images["image"], seen["pixels"]["top"])
    action = ours.state + np.float32(0.05)
    for _ in range(3):
        simulator.step(action)
        seen = theirs.step(action.astype(np.float64))[0]
    np.testing.assert_allclose(simulator.observe().state, seen["agent_pos"], atol=1e-6)
    with pytest.raises(QvlaError, match="14 finite numbers"):
        simulator.step(np.zeros(7, np.float32))
    simulator.close()


def test_a_policy_of_two_arms_runs_an_episode() -> None:
    class Holds(EchoPolicy):
        def infer(self, observation: Observation) -> ActionChunk:
            chunk = super().infer(observation)
            chunk.actions[:] = observation.state
            return chunk

    simulator = TransferCube(AlohaTask(steps=100))
    policy = BenchmarkPolicySource(partial(Holds, ALOHA))()
    config = RolloutConfig(("aloha-transfer-cube",), 1, execute=50)
    result = run_episode(simulator, policy, config, 1_000_000)
    assert (result.success, result.steps, result.motion) == (False, 100, None)
    np.testing.assert_allclose(simulator.reset(1).state, simulator.reset(1).state)
    simulator.close()
