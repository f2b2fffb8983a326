"""The control loop in virtual time: slots, overlap, alignment, holding, ramping, ending."""

import itertools
import math

import numpy as np
import pytest
from control_doubles import FRAME_S, Bench, Camera, numbered, safety, settings
from numpy.typing import NDArray

from jetson.control.loop_state import LoopState


def states(records: list) -> list[LoopState]:
    return [record.state for record in records]


def test_nothing_is_sent_before_the_first_action() -> None:
    bench = Bench(delay_s=0.35)
    records = bench.ticks(6)
    assert states(records) == [LoopState.STARTING] * 4 + [LoopState.RUNNING] * 2
    assert [record.action is None for record in records] == [True] * 4 + [False] * 2
    # The robot stood still while the first chunk was computed: nothing of it is skipped.
    assert [record.step for record in records[4:]] == [0, 1]


def test_commands_are_sent_at_absolute_slots() -> None:
    bench = Bench(settings(rate_hz=30))
    bench.robot.slow_s = 0.01
    bench.ticks(3001)
    start_s = bench.notes.records[0].due_s
    sent = np.array([command.sent_s for command in bench.robot.commands])
    slots = (sent - start_s) * 30
    assert np.abs(slots - np.round(slots)).max() < 1e-6
    assert (np.diff(np.round(slots)) == 1).all(), "what a command takes must not add up"


def test_fast_inference_arrives_before_the_next_slot_and_nothing_is_skipped() -> None:
    bench = Bench(delay_s=0.07)
    records = bench.ticks(17)[1:]
    assert [record.step for record in records] == [0, 1, 2, 3] * 4
    assert [record.chunk for record in records] == [n for n in range(4) for _ in range(4)]


def test_slow_inference_overlaps_and_steps_already_executed_are_skipped() -> None:
    bench = Bench(delay_s=0.25)
    records = bench.ticks(40)[10:]
    assert set(states(records)) == {LoopState.RUNNING}, "execution never waits for inference"
    for before, after in itertools.pairwise(records):
        if after.chunk != before.chunk:
            assert after.step == 2, "two commands were sent while it was computed"
        else:
            assert after.step == before.step + 1


@pytest.mark.parametrize("execute", [8, 20])
def test_the_next_chunk_is_asked_for_in_time_though_inference_varies(execute: int) -> None:
    bench = Bench(settings(execute=execute))
    for _ in range(100):
        bench.engine.delay_s = 0.25 if bench.engine.requests % 3 == 0 else 0.03
        bench.loop.tick()
    assert set(states(bench.notes.records[5:])) == {LoopState.RUNNING}


@pytest.mark.parametrize("execute", [1, 3, 8, 20])
def test_a_chunk_is_replaced_after_the_number_of_actions_asked_for(execute: int) -> None:
    bench = Bench(settings(execute=execute), delay_s=0.01)
    used = [record.chunk for record in bench.ticks(100)[1:-20]]
    lengths = {used.count(chunk) for chunk in used[:-20]}
    assert lengths == {min(execute, 8)}


def test_a_chunks_time_begins_when_its_frame_was_taken() -> None:
    bench = Bench()
    bench.camera.lag_s = 0.07
    bench.ticks(20)
    assert len(bench.notes.chunks) > 1
    for chunk in bench.notes.chunks:
        # Up to one frame more: the newest may be as old.
        assert 70 - 1e-6 <= chunk.timing_ms["capture"] <= 70 + FRAME_S * 1000 + 1e-6
        assert chunk.timing_ms["total"] == pytest.approx(chunk.timing_ms["capture"] + 30)


def test_frames_are_aligned_by_when_they_were_taken() -> None:
    bench = Bench(delay_s=0.01)
    bench.camera.lag_s = 0.25  # two commands older than what was sent last
    records = bench.ticks(30)[8:]
    firsts = [b.step for a, b in itertools.pairwise(records) if a.chunk != b.chunk]
    assert firsts and set(firsts) == {3}


def test_a_stalled_engine_holds_within_one_period_then_ramps_then_recovers() -> None:
    bench = Bench(settings(hold_ms=300, ramp_ms=500))
    bench.ticks(6)
    bench.engine.delay_s = 3.0
    records = bench.ticks(60)
    seen = states(records)
    held, ramped = seen.index(LoopState.HOLDING), seen.index(LoopState.RAMPING)
    last = records[held - 1]
    assert seen[held - 1] is LoopState.RUNNING and last.step == 7, "the chunk is used up first"
    assert ramped - held == 3
    positions = [record.action[1] for record in records[ramped : ramped + 5]]
    assert np.allclose(np.diff([last.action[1], *positions]), (0.25 - last.action[1]) / 5)
    bench.engine.delay_s = 0.03
    assert states(bench.ticks(40))[-1] is LoopState.RUNNING
    assert bench.loop.counters.stale_chunks >= 1, "the answer that came after three seconds"


def test_every_ramp_takes_its_time() -> None:
    bench = Bench(settings(hold_ms=0, ramp_ms=500))
    for _ in range(2):
        bench.engine.delay_s, bench.engine.ready_s = 0.03, bench.clock.time_s
        assert states(bench.ticks(15))[-1] is LoopState.RUNNING
        bench.engine.delay_s = 3.0
        records = bench.ticks(25)
        ramp = [r.action[1] for r in records if r.state is LoopState.RAMPING][:6]
        steps = np.diff(ramp)
        assert np.allclose(steps[:4], steps[0]) and steps[0] > 0 and steps[4] == 0


def test_a_chunk_seen_before_the_ramp_moved_the_robot_is_not_executed() -> None:
    bench = Bench(settings(hold_ms=100, ramp_ms=500, max_action_age_ms=5000))
    bench.ticks(3)
    bench.engine.delay_s = 1.1
    records = bench.ticks(30)
    assert LoopState.RAMPING in states(records)
    for record in bench.ticks(30):
        if record.observed_s is not None:
            ramps = [r.sent_s for r in bench.notes.records if r.state is LoopState.RAMPING]
            moving = ramps[:5]
            assert record.observed_s >= moving[-1] or record.sent_s < moving[0]
    assert bench.loop.counters.stale_chunks >= 1


def test_a_stalled_camera_holds_and_recovers() -> None:
    bench = Bench()
    bench.ticks(5)
    bench.camera.stalled = True
    assert LoopState.HOLDING in states(bench.ticks(10))
    pictures = [seen.observed_s for seen in bench.notes.observations]
    assert len(pictures) == len(set(pictures)), "the same picture is not asked about twice"
    bench.camera.stalled = False
    assert states(bench.ticks(20))[-1] is LoopState.RUNNING


def test_old_observations_are_dropped() -> None:
    bench = Bench()
    bench.camera.lag_s = 0.6
    assert set(states(bench.ticks(20))) == {LoopState.STARTING}
    assert bench.loop.counters.dropped_observations == 20
    assert not bench.notes.observations


def test_no_command_is_older_than_the_bound() -> None:
    bench = Bench(settings(max_action_age_ms=350, max_observation_age_ms=350), delay_s=0.15)
    bench.ticks(10)
    bench.engine.delay_s = 0.9
    bench.ticks(30)
    ages = [r.age_ms for r in bench.notes.records if r.age_ms is not None]
    assert max(ages) <= 350 and max(ages) > 250
    assert LoopState.HOLDING in states(bench.notes.records)


def raising(request: int) -> NDArray[np.float32]:
    raise RuntimeError("the engine is on fire")


def spoiled(value: float) -> NDArray[np.float32]:
    actions = numbered(0)
    actions[5, 1] = value
    return actions


@pytest.mark.parametrize(
    "behaviour",
    [
        raising,
        lambda request: spoiled(np.nan),
        lambda request: spoiled(np.inf),
        lambda request: np.zeros((8, 2), np.float32),
        lambda request: np.zeros((0, 3), np.float32),
        lambda request: np.zeros(3, np.float32),
        lambda request: np.array([["a"] * 3]),
    ],
)
def test_a_failing_engine_is_a_state_and_nothing_of_it_is_sent(behaviour) -> None:
    bench = Bench()
    bench.ticks(4)
    bench.engine.behaviour = behaviour
    records = bench.ticks(8)
    assert LoopState.HOLDING in states(records)
    first = states(records).index(LoopState.HOLDING)
    assert set(states(records[first:])) <= {LoopState.HOLDING, LoopState.RAMPING}
    assert bench.loop.counters.faults >= 1
    assert any("inference" in event for record in records for event in record.events)
    bench.engine.behaviour = numbered
    assert states(bench.ticks(20))[-1] is LoopState.RUNNING


def test_a_failing_engine_holds_at_once_though_its_last_chunk_has_actions_left() -> None:
    bench = Bench(settings(execute=1))
    assert states(bench.ticks(4))[-1] is LoopState.RUNNING
    bench.engine.behaviour = raising
    assert states(bench.ticks(1)) == [LoopState.HOLDING]


def test_values_are_cut_to_the_limits_and_counted() -> None:
    bench = Bench(behaviour=lambda request: np.full((8, 3), 7.0, np.float32))
    bench.ticks(3)
    assert [c.action.tolist() for c in bench.robot.commands] == [[1, 1, 1]] * 2
    assert bench.loop.counters.clamped_values == 6


def test_a_largest_step_is_kept_on_every_command() -> None:
    bench = Bench(
        action_safety=safety(max_step=0.05),
        behaviour=lambda request: np.full((8, 3), (-1) ** request, np.float32),
    )
    bench.ticks(30)
    bench.finish()
    actions = np.stack([command.action for command in bench.robot.commands])
    assert np.abs(np.diff(actions, axis=0)).max() <= np.float32(0.05) + 1e-6
    assert actions[-1, :2].tolist() == [0.0, 0.25]


def test_the_loop_that_was_kept_from_running_skips_slots_and_sends_no_burst() -> None:
    bench = Bench()
    bench.ticks(3)
    bench.clock.oversleep_s = 0.43
    before, after = bench.notes.records[-1], bench.loop.tick()
    assert after.slot - before.slot == 5 and bench.loop.counters.skipped_slots == 4
    assert 0.02 < after.late_ms / 1000 < 0.1
    bench.ticks(5)
    assert (np.diff([r.slot for r in bench.notes.records[-6:]]) == 1).all()


def test_ensemble_averages_what_the_chunks_say_of_one_moment() -> None:
    decay = 0.3
    bench = Bench(settings(mode="ensemble", ensemble_decay=decay), delay_s=0.01)
    records = bench.ticks(30)[-5:]
    for record in records:
        # Chunk n was seen just before command n; eight of them speak of this command.
        chunks = np.arange(record.chunk - 7, record.chunk + 1)
        steps = np.arange(7, -1, -1)
        weights = np.exp(-decay * np.arange(8))
        assert record.action[0] == pytest.approx((weights * chunks / 100).sum() / weights.sum())
        assert record.action[1] == pytest.approx((weights * steps / 100).sum() / weights.sum())
        assert record.age_ms == pytest.approx(800, abs=FRAME_S * 1000 + 1e-6)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_a_stop_ends_with_the_safe_action(after: int) -> None:
    bench = Bench(settings(ramp_ms=400))
    bench.ticks(after)
    records = bench.finish()
    if after <= 1:
        assert not bench.robot.commands, "a robot that was never moved is left alone"
        assert states(records) == [LoopState.STOPPED]
        return
    assert states(records) == [LoopState.STOPPING] * 3 + [LoopState.STOPPED]
    assert [r.action[0] for r in records] == [0.0] * 4, "a displacement ends at once"
    assert records[-1].action[1:] == (0.25, -1.0)


def test_the_end_of_the_source_ends_the_run() -> None:
    bench = Bench()
    bench.ticks(4)
    bench.camera.is_over = True
    result = bench.loop.run()
    assert result.ok and result.state is LoopState.STOPPED and "source" in result.reason
    assert bench.robot.commands[-1].action[1] == np.float32(0.25)


def test_the_time_asked_for_is_kept() -> None:
    result = Bench().loop.run(seconds=2.0)
    assert result.ok and 2.0 <= result.seconds < 3.2
    assert result.counters["sent"] == 19


def test_it_gives_up_after_a_while_and_says_why() -> None:
    bench = Bench(settings(give_up_s=4), behaviour=raising)
    result = bench.loop.run()
    assert result.state is LoopState.FAULT and not result.ok and "4 s" in result.reason
    assert not bench.robot.commands
    bench = Bench(settings(give_up_s=4))
    bench.ticks(10)
    bench.camera.error = OSError("unplugged")
    result = bench.loop.run()
    assert result.state is LoopState.FAULT
    assert bench.robot.commands[-1].action[1] == np.float32(0.25)


@pytest.mark.parametrize("failures", [1, 2, 50])
def test_a_robot_that_cannot_be_reached_ends_the_run(failures: int) -> None:
    bench = Bench(settings(ramp_ms=0))
    bench.ticks(5)
    bench.robot.failures = failures
    result = bench.loop.run()
    assert result.state is LoopState.FAULT and "cable" in result.reason
    reached = bench.robot.commands[-1].action[1] == np.float32(0.25)
    assert reached == (failures == 1)


def test_a_full_disk_does_not_stop_the_robot() -> None:
    bench = Bench()

    def full(record: object) -> None:
        raise OSError("no space left")

    bench.notes.on_step = full  # type: ignore[method-assign]
    bench.ticks(10)
    assert bench.loop.state is LoopState.RUNNING and bench.loop.counters.faults == 1


def test_whatever_breaks_in_the_loop_the_robot_gets_the_safe_action() -> None:
    bench = Bench()
    bench.ticks(5)

    class Interrupted(Camera):
        def read(self) -> None:
            raise KeyboardInterrupt

    bench.loop._source = Interrupted(bench.clock)
    with pytest.raises(KeyboardInterrupt):
        bench.loop.run()
    assert bench.loop.state is LoopState.FAULT
    assert bench.robot.commands[-1].action[:2].tolist() == [0.0, 0.25]


def test_a_late_chunk_estimate_forgets_a_slow_start() -> None:
    bench = Bench(delay_s=0.55)
    bench.ticks(8)
    bench.engine.delay_s = 0.01
    records = bench.ticks(60)
    assert {r.step for r in records[-20:]} == {0, 1, 2, 3}
    assert math.isclose(bench.loop.counters.sent, 63, abs_tol=3)
