"""Seams in the control loop: a chunk fades over from the commands before it."""

import numpy as np
import pytest
from control_doubles import Bench, settings
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from jetson.control.loop_state import LoopState
from jetson.errors import RefusedSetting
from qvla_export.shared.motion.seams import faded, steps_of

LIMIT = np.array([0.2, np.inf, np.inf], np.float32)


def back_and_forth(request: int) -> NDArray[np.float32]:
    """Chunks that jump by 1 from one to the next, in every number."""
    return np.full((8, 3), 0.5 if request % 2 else -0.5, np.float32)


@pytest.mark.parametrize("delay_s", [0.03, 0.25])
def test_no_command_jumps_further_than_the_limit(delay_s: float) -> None:
    bench = Bench(settings(execute=8, seam_limit=LIMIT), None, back_and_forth, delay_s=delay_s)
    bench.engine.delay_s = delay_s
    records = [record for record in bench.ticks(60) if record.state is LoopState.RUNNING]
    actions = np.array([record.action for record in records])
    assert np.abs(np.diff(actions[:, 0])).max() == pytest.approx(0.2)
    assert {-0.5, 0.5} <= set(actions[:, 0].tolist()), "they become what the policy wants"
    assert np.abs(np.diff(actions[:, 1])).max() == 1.0, "any"
    plain = Bench(settings(execute=8), None, back_and_forth, delay_s=delay_s)
    jumps = [r.action[0] for r in plain.ticks(60) if r.state is LoopState.RUNNING]
    assert np.abs(np.diff(jumps)).max() == 1.0


def test_after_holding_a_chunk_fades_in_from_rest() -> None:
    bench = Bench(settings(execute=8, seam_limit=LIMIT, hold_ms=5000), None, back_and_forth)
    bench.ticks(6)
    bench.engine.delay_s = 2.0
    bench.ticks(12)
    bench.engine.delay_s = 0.03
    records = bench.ticks(30)
    held = [number for number, r in enumerate(records) if r.state is LoopState.HOLDING]
    after = [record.action[0] for record in records[held[-1] + 1 :]]
    assert np.abs(after[:3]).tolist() == pytest.approx([0.5 / 3, 1 / 3, 0.5])


@given(
    st.lists(st.floats(-1, 1, width=32), min_size=6, max_size=6),
    st.floats(-1, 1, width=32),
    st.floats(0.05, 2),
)
def test_a_fade_changes_nothing_faster_than_its_limit_allows(wanted, before, limit) -> None:
    actions = np.array(wanted, np.float32)[:, None]
    gap = np.array([before], np.float32) - actions[0]
    steps = steps_of(gap, np.array([limit]))
    found = faded(actions, gap, steps)
    own = np.abs(np.diff(actions[:, 0])).max(initial=0.0)
    jumps = np.abs(np.diff(found[:, 0], prepend=np.float32(before)))
    assert jumps[0] <= limit + 1e-6 and jumps.max() <= limit + own + 1e-6
    np.testing.assert_allclose(found[max(steps - 1, 0) :], actions[max(steps - 1, 0) :], atol=1e-7)


def test_impossible_seams_are_refused() -> None:
    with pytest.raises(RefusedSetting, match="largest change must be above 0"):
        settings(seam_limit=np.array([0.1, np.nan, 1.0], np.float32))
    with pytest.raises(RefusedSetting, match="no seams"):
        settings(seam_limit=LIMIT, mode="ensemble")
