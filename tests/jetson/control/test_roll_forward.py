"""Roll-forward in the control loop: the policy sees the state in which its chunk begins."""

import itertools

import numpy as np
import pytest
from control_doubles import Bench, LoopClock, safety, settings
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from jetson.control.loop_state import LoopState
from jetson.control.sinks import Command
from jetson.control.sources import TimedObservation
from qvla_export.shared.errors import QvlaError
from qvla_export.shared.motion.command_response import CommandResponse
from qvla_export.shared.observation import Observation

IMAGE = {"image": np.zeros((4, 4, 3), np.uint8)}
# A displacement, a position, and a number of the state that is another thing.
EFFECTS = np.array([0.5, np.nan, 0.0])
PROMPT, SLOW = np.ones(1), np.array([0.2, 0.5, 0.2])


class Arm:
    """A robot whose state follows its commands; what it shows is some time old."""

    def __init__(self, clock: LoopClock, shares: NDArray[np.float64], lag_s: float) -> None:
        self.clock, self.lag_s, self.is_over = clock, lag_s, False
        self.shares = shares
        # When each command came, and the command.
        self.times: list[float] = []
        self.commands: list[NDArray[np.float64]] = []

    def send(self, command: Command) -> None:
        self.times.append(self.clock.time_s)
        self.commands.append(command.action.astype(np.float64))

    def state(self, count: int) -> NDArray[np.float32]:
        """After so many commands, the last of which has had its period."""
        way, height = 3.0, 0.75
        for number, command in enumerate(self.commands[:count]):
            done = self.shares[: count - number].sum()
            way += 0.5 * command[0] * done
            # A position leads on from the last one; the first is where the arm stood.
            height += (command[1] - self.commands[max(number - 1, 0)][1]) * done
        return np.array([way, height, 7.0, 8.0], np.float32)

    def read(self) -> TimedObservation:
        observed_s = self.clock.time_s - self.lag_s
        count = sum(time_s <= observed_s for time_s in self.times)
        return TimedObservation(Observation(IMAGE, "go", self.state(count)), observed_s)

    def close(self) -> None:
        pass


def wandering(request: int) -> NDArray[np.float32]:
    """Eight actions, some of them beyond the limits."""
    random = np.random.default_rng(request)
    return random.uniform(-1.3, 1.3, (8, 3)).astype(np.float32)


def rolling(
    mode: str = "receding", shares: NDArray[np.float64] = PROMPT, lag_s: float = 0.0
) -> Bench:
    """A bench whose robot moves."""
    response = CommandResponse(EFFECTS, shares)
    changes = {"mode": mode, "response": response, "max_action_age_ms": 3000}
    return Bench(
        settings(**changes), safety(0.8), wandering, lambda clock: Arm(clock, shares, lag_s)
    )


@pytest.mark.parametrize("mode", ["receding", "ensemble"])
@pytest.mark.parametrize("shares", [PROMPT, SLOW])
@pytest.mark.parametrize("lag_s", [0.0, 0.17])
@pytest.mark.parametrize("delays_s", [[0.03], [0.25], [0.45], [0.35, 0.03, 0.15]])
def test_the_state_shown_is_the_one_the_chunk_begins_in(
    mode: str, shares: NDArray[np.float64], lag_s: float, delays_s: list[float]
) -> None:
    bench = rolling(mode, shares, lag_s)
    for _ in range(120):
        bench.engine.delay_s = delays_s[bench.engine.requests % len(delays_s)]
        bench.loop.tick()
    sent = [record for record in bench.notes.records if record.sent_s is not None]
    assert len(sent) == len(bench.robot.commands)
    begun = 0
    for number, record in enumerate(sent):
        if record.step != 0:
            continue
        shown = bench.notes.observations[record.chunk].observation.state
        np.testing.assert_allclose(shown, bench.robot.state(number), atol=1e-5)
        begun += 1
    assert begun > 9
    if mode == "receding":
        # How long a thought takes is known by now: nothing of a chunk is skipped.
        running = bench.notes.records[30:]
        assert {record.state for record in running} == {LoopState.RUNNING}
        for before, after in itertools.pairwise(running):
            assert after.step == (before.step + 1 if after.chunk == before.chunk else 0)


def test_a_chunk_begins_when_it_was_foreseen_though_it_comes_before() -> None:
    bench = rolling()
    bench.engine.delay_s = 0.45
    bench.ticks(30)
    bench.engine.delay_s = 0.03
    records = bench.ticks(20)
    early = next(number for number, record in enumerate(records) if record.infer_ms == 30)
    chunk = records[early].chunk
    follows = [record.step for record in records[early:] if record.chunk == chunk]
    assert len(follows) >= 4, "the chunk before it goes on"
    after = next(record for record in records[early:] if record.chunk != chunk)
    assert after.step == 0


def test_a_chunk_for_where_the_robot_did_not_get_to_is_dropped() -> None:
    bench = rolling()
    bench.engine.delay_s = 0.45
    bench.ticks(30)
    looks = len(bench.notes.observations)
    while len(bench.notes.observations) == looks:
        bench.loop.tick()
    bench.engine.delay_s = 0.03
    # The whole machine stood still: what was to lead to the new chunk is too old to be sent.
    bench.clock.oversleep_s = 2.5
    records = bench.ticks(12)
    events = [event for record in records for event in record.events]
    assert any("where the robot did not get to" in event for event in events)
    assert bench.loop.counters.stale_chunks >= 1
    assert records[0].state is LoopState.HOLDING and records[-1].state is LoopState.RUNNING
    assert all(record.step is None or record.step >= 0 for record in records)


def test_a_state_that_is_too_short_moves_nothing() -> None:
    bench = rolling()
    bench.robot.state = lambda count: np.zeros(2, np.float32)
    records = bench.ticks(5)
    assert all(record.action is None for record in records)
    assert "3 numbers of the state, got 2" in records[0].events[0]


def test_without_roll_forward_what_is_seen_is_shown() -> None:
    plain = Bench(
        settings(), behaviour=wandering, arm=lambda clock: Arm(clock, PROMPT, 0.0), delay_s=0.25
    )
    plain.ticks(30)
    for shown in plain.notes.observations:
        count = sum(time_s <= shown.observed_s for time_s in plain.robot.times)
        assert shown.observation.state.tolist() == plain.robot.state(count).tolist()


ACTIONS = st.lists(
    st.lists(st.floats(-1, 1, width=32), min_size=3, max_size=3).map(np.array), max_size=5
)


@given(ACTIONS, ACTIONS, ACTIONS, st.sampled_from([PROMPT, SLOW]))
def test_what_commands_move_adds_up(sent, first, then, shares) -> None:
    response = CommandResponse(EFFECTS, shares)
    both = response.moved(sent, [*first, *then])
    parts = response.moved(sent, first) + response.moved([*sent, *first], then)
    np.testing.assert_allclose(both, parts, atol=1e-9)
    assert both[2] == 0.0


def test_what_commands_move_by_hand() -> None:
    prompt, slow = CommandResponse(EFFECTS), CommandResponse(EFFECTS, SLOW)
    a, b = np.array([1.0, 0.2, 1.0]), np.array([-0.5, 0.5, 1.0])
    assert prompt.moved([], []).tolist() == [0.0, 0.0, 0.0]
    assert prompt.moved([a], []).tolist() == [0.0, 0.0, 0.0], "it was done when it was seen"
    np.testing.assert_allclose(prompt.moved([a], [b]), [-0.25, 0.3, 0.0])
    np.testing.assert_allclose(prompt.moved([], [a, b]), [0.25, 0.3, 0.0])
    # A fifth of b, and of a the half that comes in its second period.
    np.testing.assert_allclose(slow.moved([a], [b]), [0.5 * (0.5 - 0.5 * 0.2), 0.3 * 0.2, 0.0])


@pytest.mark.parametrize(
    ("effects", "shares", "message"),
    [
        ([], [1.0], "a number for each"),
        ([np.inf], [1.0], "a number for each"),
        ([1.0], [], "shares of a command"),
        ([1.0], [np.nan], "shares of a command"),
    ],
)
def test_a_response_that_says_nothing_is_refused(effects, shares, message: str) -> None:
    with pytest.raises(QvlaError, match=message):
        CommandResponse(np.array(effects, float), np.array(shares, float))
