"""Time that passes while a policy thinks: which slots of which chunk are executed."""

import numpy as np
import pytest
from scripted_policies import ConstantPolicy

from calibration.benchmarks.delay import CommandQueue
from calibration.benchmarks.evaluation import RolloutConfig
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import find_task
from calibration.benchmarks.rollouts import run_episode
from qvla_export.shared.errors import QvlaError

HELD = None


def chunk_of(number: int, horizon: int = 8) -> np.ndarray:
    """A chunk whose x says its number and slot, and whose gripper says its number."""
    slots = number + np.arange(horizon) / 10
    return np.stack([slots, 0 * slots, 0 * slots, 0 * slots + number], axis=1).astype(np.float32)


def executed(execute: int, delay: int, looks: int, horizon: int = 8) -> list[list[float | None]]:
    """Chunk.slot of every command between looks; None where the arm holds still."""
    queue = CommandQueue(execute, delay)
    rounds: list[list[float | None]] = []
    for number in range(1, looks + 1):
        steps = queue.steps(chunk_of(number, horizon))
        rounds.append([round(float(s.action[0]), 1) if s.action[0] else HELD for s in steps])
        for step in steps:
            if step.action[0]:
                assert step.chunk == int(step.action[0] + 0.01)
    return rounds


@pytest.mark.parametrize(
    ("execute", "delay", "expected"),
    [
        # Time stands still: the first slots of each chunk.
        (
            8,
            0,
            [[1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7], [2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 2.6, 2.7]],
        ),
        (3, 0, [[1.0, 1.1, 1.2], [2.0, 2.1, 2.2]]),
        # Two steps late: the first chunk begins at its slot 2 and lasts until the second is there.
        (8, 2, [[HELD, HELD, 1.2, 1.3, 1.4, 1.5], [1.6, 1.7, 2.2, 2.3, 2.4, 2.5]]),
        # Half the horizon: nothing of a chunk is executed before the next look.
        (8, 4, [[HELD] * 4, [1.4, 1.5, 1.6, 1.7], [2.4, 2.5, 2.6, 2.7]]),
        # Thinking takes longer than a chunk lasts: the arm waits.
        (8, 6, [[HELD] * 6, [1.6, 1.7, HELD, HELD, HELD, HELD]]),
        (8, 8, [[HELD] * 8, [HELD] * 8]),
    ],
)
def test_slots_are_moments(execute: int, delay: int, expected: list[list[float | None]]) -> None:
    assert executed(execute, delay, len(expected)) == expected


def test_a_short_chunk_is_executed_as_far_as_it_goes() -> None:
    assert executed(8, 0, 2, horizon=2) == [[1.0, 1.1], [2.0, 2.1]]
    assert executed(8, 1, 2, horizon=2) == [[HELD], [1.1]]


def test_a_waiting_arm_keeps_its_gripper() -> None:
    queue = CommandQueue(8, 6)
    assert [step.action[3] for step in queue.steps(chunk_of(1))] == [0.0] * 6
    assert [step.action[3] for step in queue.steps(chunk_of(2))] == [1.0] * 6


def test_a_delayed_policy_looks_when_its_thought_is_over() -> None:
    chunk = np.full((8, 4), 0.5, np.float32)
    with Simulator(find_task("push")) as simulator:
        policy = ConstantPolicy(chunk)
        config = RolloutConfig(("push",), 1, delay_steps=4)
        result = run_episode(simulator, policy, config, 0)
    assert len(policy.seen) == simulator.task.steps // 4 == 30
    # The first four steps stand still; of 20 mm each, half, along three axes.
    motion = result.motion
    assert motion is not None and motion.seam_jumps_mm[0] == pytest.approx(10 * np.sqrt(3))
    assert motion.seam_jumps_mm[1:] == pytest.approx([0.0] * 28)
    with pytest.raises(QvlaError, match="delay_steps >= 0"):
        RolloutConfig(("push",), 1, delay_steps=-1)
