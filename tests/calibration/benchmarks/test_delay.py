"""Time that passes while a policy thinks: which slots of which chunk are executed."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from scripted_policies import ConstantPolicy

from calibration.benchmarks.delay import CommandQueue
from calibration.benchmarks.episode import run_episode
from calibration.benchmarks.evaluation import Evaluation, RolloutConfig
from calibration.benchmarks.metaworld.roll_forward import Ahead, hand_ahead, roll_forward
from calibration.benchmarks.metaworld.simulator import Simulator
from calibration.benchmarks.metaworld.tasks import find_task
from qvla_export.shared.errors import QvlaError

HELD = None


def chunk_of(number: int, horizon: int = 8) -> np.ndarray:
    """A chunk whose x says its number and slot, and whose gripper says its number."""
    slots = number + np.arange(horizon) / 10
    return np.stack([slots, 0 * slots, 0 * slots, 0 * slots + number], axis=1).astype(np.float32)


def executed(
    execute: int, delay: int, looks: int, horizon: int = 8, foreseen: int = 0
) -> list[list[float | None]]:
    """Chunk.slot of every command between looks; None where the arm holds still."""
    queue = CommandQueue(execute)
    rounds: list[list[float | None]] = []
    for number in range(1, looks + 1):
        steps = queue.steps(chunk_of(number, horizon), delay, foreseen)
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


@pytest.mark.parametrize(
    ("execute", "delay", "foreseen", "expected"),
    [
        # The first slot is when the chunk comes; the last chunk goes on until then.
        (6, 2, 2, [[HELD, HELD, 1.0, 1.1, 1.2, 1.3], [1.4, 1.5, 2.0, 2.1, 2.2, 2.3]]),
        (4, 4, 4, [[HELD] * 4, [1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]]),
        (8, 4, 4, [[HELD] * 4 + [1.0, 1.1, 1.2, 1.3], [1.4, 1.5, 1.6, 1.7, 2.0, 2.1, 2.2, 2.3]]),
        (8, 8, 8, [[HELD] * 8, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7]]),
        # Later than foreseen: what has passed is left out. Earlier: the last chunk goes on.
        (8, 3, 2, [[HELD, HELD, HELD, 1.1, 1.2, 1.3, 1.4], [1.5, 1.6, 1.7, 2.1, 2.2, 2.3, 2.4]]),
        (4, 1, 3, [[HELD, HELD, HELD, 1.0], [1.1, 1.2, 1.3, 2.0]]),
    ],
)  # fmt: skip
def test_a_foreseen_chunk_begins_when_it_comes(
    execute: int, delay: int, foreseen: int, expected: list[list[float | None]]
) -> None:
    assert executed(execute, delay, len(expected), foreseen=foreseen) == expected


def test_a_seam_is_faded_over() -> None:
    first, second = np.zeros((4, 4), np.float32), np.zeros((8, 4), np.float32)
    first[:, 0], second[:, 0], second[:, 3] = -0.5, 0.5, 1.0
    queue = CommandQueue(8, seam_limit=0.3)
    begun = [float(step.action[0]) for step in queue.steps(first, 0)]
    assert begun == [-0.25, -0.5, -0.5, -0.5], "from rest, half of it is within the limit"
    faded = np.stack([step.action for step in queue.steps(second, 0)])
    # 1.0 at 0.3 a step takes four.
    np.testing.assert_allclose(faded[:, 0], [-0.25, 0.0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.5])
    np.testing.assert_array_equal(faded[:, 3], 1.0, "a gripper is not blended")
    # A seam within the limit is left as it is.
    easy = CommandQueue(4, seam_limit=1.0)
    for chunk in (first, second):
        taken = [step.action.tolist() for step in easy.steps(chunk, 0)]
        assert taken == chunk[:4].tolist()
    # Where thinking takes time, it is the committed command that is faded from.
    late = CommandQueue(4, seam_limit=0.5)
    late.steps(first, 4, 4)
    late.steps(first, 4, 4)
    late.steps(second, 4, 4)
    assert [round(float(s.action[0]), 3) for s in late.steps(second, 4, 4)] == [0.0, 0.5, 0.5, 0.5]


def test_a_short_chunk_is_executed_as_far_as_it_goes() -> None:
    assert executed(8, 0, 2, horizon=2) == [[1.0, 1.1], [2.0, 2.1]]
    assert executed(8, 1, 2, horizon=2) == [[HELD], [1.1]]


def test_a_waiting_arm_keeps_its_gripper() -> None:
    queue = CommandQueue(8)
    assert [step.action[3] for step in queue.steps(chunk_of(1), 6)] == [0.0] * 6
    assert [step.action[3] for step in queue.steps(chunk_of(2), 6)] == [1.0] * 6


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
    with pytest.raises(QvlaError, match="leave out live or delay_steps"):
        RolloutConfig(("push",), 1, delay_steps=1, live=True)


def test_a_live_rollout_waits_as_long_as_the_policy_thinks() -> None:
    # Each look at the clock is 60 ms after the last, 2.4 control steps: 3 pass.
    ticks = itertools.count()
    policy = ConstantPolicy(np.full((8, 4), 0.5, np.float32))
    with Simulator(find_task("push")) as simulator:
        config = RolloutConfig(("push",), 1, live=True)
        result = run_episode(simulator, policy, config, 0, clock=lambda: 0.06 * next(ticks))
    assert result.infer_ms == pytest.approx([60.0] * len(policy.seen))
    # Chunks of 8 minus 3 that pass; 120 steps in rounds of 5.
    assert len(policy.seen) == 120 // 5
    rows = Evaluation("p", "d", config, (result,), {})
    assert rows.infer_ms() == pytest.approx((60.0, 60.0))
    assert rows.solved_per_hour() == (3600 * 40 / 120 if result.success else 0.0)


def test_a_policy_is_shown_where_the_hand_will_be() -> None:
    """A constant push: at each look the state shown is where the hand is when its chunk begins."""
    policy = ConstantPolicy(np.tile(np.float32([0.3, 0.2, -0.1, 0.0]), (8, 1)))
    with Simulator(replace(find_task("push"), steps=40)) as simulator:
        plain, rolled = (
            RolloutConfig(("push",), 1, execute=4, delay_steps=4, roll_forward=yes)
            for yes in (False, True)
        )
        run_episode(simulator, policy, plain, 0)
        hands = [seen.state[:3] for seen in policy.seen]
        policy.seen.clear()
        run_episode(simulator, policy, rolled, 0)
        shown = [seen.state[:3] for seen in policy.seen]
    # The same commands at the same looks, every four steps: what is shown is the next look's state.
    moved = np.linalg.norm(np.diff(hands, axis=0), axis=1)
    missed = np.linalg.norm(np.array(shown[1:-1]) - hands[2:], axis=1)
    assert moved[2:].min() > 0.02
    assert missed[2:].max() < 0.006
    assert shown[0].tolist() == hands[0].tolist()


def test_what_moves_along_with_the_hand_is_rolled_with_it() -> None:
    full_state = np.zeros(39)
    full_state[[0, 4, 11]] = 0.1, 0.12, 0.3
    full_state[[18, 22, 29]] = 0.09, 0.11, 0.3  # the hand and the first thing moved 10 mm
    full_state[[3, 21]] = 0.5, 0.53  # closing
    ahead = Ahead(np.array([0.0, 0.05, 0.0]), 4)
    rolled = roll_forward(full_state, ahead)
    assert rolled[:3].tolist() == [0.1, 0.05, 0.0]
    assert rolled[3] == pytest.approx(0.5 - 0.7 * 8 * 0.03)
    assert rolled[4:7].tolist() == [0.12, 0.05, 0.0]
    assert rolled[11:14].tolist() == [0.3, 0.0, 0.0]
    # At rest it holds what lies in a gripper that has stopped, and nothing while that still closes.
    for moving, expected in ((0.0, 0.05), (0.03, 0.0)):
        full_state[18:36] = full_state[:18]
        full_state[21] += moving
        still = roll_forward(full_state, ahead)
        assert still[4:7].tolist() == [0.12, expected, 0.0]
        assert still[11:14].tolist() == [0.3, 0.0, 0.0], "too far away to be held"


def test_commands_that_are_under_way_still_move_the_hand() -> None:
    push = [np.float32([1.0, 0.0, 0.0, 0.0])]
    assert hand_ahead([], []).hand.tolist() == [0.0, 0.0, 0.0]
    assert hand_ahead(push, []).hand[0] == 0.0, "nothing passes, nothing moves"
    rest = np.zeros(4, np.float32)
    first = hand_ahead([], [*push, rest, rest]).hand[0]
    later = hand_ahead([*push, rest, rest], [rest] * 8).hand[0]
    # What is made within three steps and after that is one command, 20 mm but for a ninth.
    assert first + later == pytest.approx(0.0177)
    assert 0.012 < first < 0.016
