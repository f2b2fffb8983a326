"""A load's figures, in virtual time: what a stall, a slow server or a slow generator does."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jetson.clients.load import LoadPlan, LoadTimes, run_load
from jetson.clients.load_result import LoadResult
from jetson.control.loop_clock import SimulatedClock
from jetson.errors import RefusedSetting, RemoteError


@dataclass
class Server:
    """Takes so long for a request, in virtual time."""

    clock: SimulatedClock
    usual_s: float = 0.001
    # Number of a request -> what it takes instead.
    stalls_s: tuple[tuple[int, float], ...] = ()
    fails: tuple[int, ...] = ()

    def ask(self, index: int) -> None:
        self.clock.time_s += dict(self.stalls_s).get(index, self.usual_s)
        if index in self.fails:
            raise RemoteError(f"refused as number {index % 2}")


def loaded(plan: LoadPlan, deadline_ms: float | None = None, **server: object) -> LoadResult:
    clock = SimulatedClock(1000.0)
    ask = Server(clock, **server).ask  # type: ignore[arg-type]  # its fields
    times = run_load([ask], plan, clock, cpu_now_s=lambda: 0.0)
    return LoadResult("act", "there", plan, times, deadline_ms)


def test_all_that_is_due_in_a_stall_is_late() -> None:
    result = loaded(LoadPlan(100, 1), deadline_ms=100, stalls_s=((20, 0.5),))
    # 20 takes 500 ms; each after it was due 10 ms later and took 1 ms once its turn had come.
    stalled = [500 - 9 * behind for behind in range(55)]
    np.testing.assert_allclose(result.corrected_ms[20:75], stalled, atol=1e-6)
    np.testing.assert_allclose(result.corrected_ms[[*range(20), *range(76, 100)]], 1, atol=1e-6)
    # Counted from sending, the stall is one request of a hundred.
    assert (result.service_ms > 1.5).sum() == 1 and np.median(result.service_ms) < 1.5
    assert (result.corrected_ms > 100).sum() == 45
    figures = result.to_json()
    assert figures["corrected_ms"]["p90"] > 400 and figures["service_ms"]["p90"] < 1.5
    assert figures["misses"]["count"] == figures["misses"]["longest_run"] == 45
    np.testing.assert_allclose(
        result.waited_ms + result.lag_ms + result.service_ms, result.corrected_ms, atol=1e-6
    )
    assert result.generator_kept_up and result.achieved_hz == pytest.approx(100)


def test_a_rate_that_cannot_be_held() -> None:
    # 50 ms each, one due every 10 ms: after a second and one of grace, 40 were sent.
    result = loaded(LoadPlan(100, 1, grace_s=1), deadline_ms=60, usual_s=0.05)
    assert result.has_reply.sum() == 40 and result.never_sent.sum() == 60
    assert result.achieved_hz == pytest.approx(20)
    # The last were due shortly before the end, and given up a second later.
    assert len(result.corrected_ms) == 100 and result.corrected_ms.min() == pytest.approx(50)
    assert result.corrected_ms[-1] == pytest.approx(1010)
    np.testing.assert_allclose(result.service_ms, 50)
    assert result.misses is not None and result.misses.count == 99
    notes = " ".join(result.notes())
    assert "the rate was not held: 20 of 100 Hz" in notes and "60 were never sent" in notes
    assert result.generator_kept_up


def test_a_generator_that_lags_says_so() -> None:
    @dataclass
    class Oversleeping(SimulatedClock):
        def sleep_until(self, deadline_s: float) -> None:
            super().sleep_until(deadline_s)
            self.time_s += 0.004

    clock, plan = Oversleeping(), LoadPlan(100, 1)
    times = run_load([Server(clock).ask], plan, clock, cpu_now_s=lambda: 0.0)
    result = LoadResult("act", "there", plan, times)
    np.testing.assert_allclose(result.lag_ms, 4)
    np.testing.assert_allclose(result.corrected_ms, 5)
    assert not result.generator_kept_up and not result.to_json()["generator_kept_up"]
    assert "p99 of its own delay is 4.00 ms of the 5.00 ms" in result.notes()[0]


def test_a_generator_that_computes_all_the_time_says_so() -> None:
    clock, plan = SimulatedClock(), LoadPlan(100, 1)
    spent = iter([3.0, 3.95])
    times = run_load([Server(clock).ask], plan, clock, cpu_now_s=lambda: next(spent))
    result = LoadResult("act", "there", plan, times)
    assert result.cpu_share == pytest.approx(0.95, abs=0.01)
    assert any("computed 95% of the time" in note for note in result.notes())


def test_failures_are_counted_by_reason_and_have_no_latency() -> None:
    result = loaded(LoadPlan(10, 1), deadline_ms=500, fails=(2, 3, 4))
    assert result.reasons == {
        "RemoteError: refused as number 0": 2,
        "RemoteError: refused as number 1": 1,
    }
    assert len(result.corrected_ms) == len(result.service_ms) == 7
    assert result.misses is not None
    assert result.misses.count == result.misses.longest_run == 3
    assert result.achieved_hz == pytest.approx(7) and result.notes()


def test_nothing_answered(tmp_path: Path) -> None:
    result = loaded(LoadPlan(10, 1), fails=tuple(range(10)))
    result.save(tmp_path / "load.json")
    saved = json.loads((tmp_path / "load.json").read_text())
    assert saved["answered"] == 0 and saved["achieved_hz"] == 0
    assert saved["corrected_ms"] is None and saved["misses"] is None
    assert len(saved["samples_ms"]["sent"]) == 10


def test_many_reasons_are_summed() -> None:
    times = LoadTimes(*(np.zeros(40) for _ in range(4)), {i: f"reason {i}" for i in range(40)}, 0)
    result = LoadResult("act", "there", LoadPlan(40, 1), times)
    assert len(result.reasons) == 21 and result.reasons["other reasons"] == 20


def test_requests_never_sent_are_written_as_null(tmp_path: Path) -> None:
    result = loaded(LoadPlan(100, 1, grace_s=0), usual_s=0.5)
    result.save(tmp_path / "load.json")
    saved = json.loads((tmp_path / "load.json").read_text())
    assert saved["samples_ms"]["sent"].count(None) == saved["never_sent"] > 90


@given(st.floats(0.5, 500), st.floats(2.1, 20))
def test_constant_arrivals(rate_hz: float, duration_s: float) -> None:
    due_s = LoadPlan(rate_hz, duration_s).due_s()
    assert len(due_s) == round(rate_hz * duration_s) and due_s[0] == 0
    np.testing.assert_allclose(np.diff(due_s), 1 / rate_hz)


def test_poisson_arrivals_are_seeded_and_as_many_as_asked() -> None:
    plan = LoadPlan(100, 100, arrivals="poisson", seed=3)
    due_s = plan.due_s()
    assert np.array_equal(due_s, plan.due_s())
    assert not np.array_equal(due_s[:9], LoadPlan(100, 100, arrivals="poisson", seed=4).due_s()[:9])
    assert (np.diff(due_s) >= 0).all() and due_s[-1] < 100
    # 10,000 expected: four standard deviations.
    assert abs(len(due_s) - 10_000) < 400
    # Exponential gaps: as wide as their mean.
    assert np.std(np.diff(due_s)) == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate_hz": 0}, "rate_hz must be in"),
        ({"rate_hz": math.nan}, "rate_hz must be in"),
        ({"duration_s": math.inf}, "duration_s must be in"),
        ({"clients": 0}, "clients must be in"),
        ({"grace_s": -1}, "grace_s must be in"),
        ({"arrivals": "bursts"}, "arrivals must be one of"),
        ({"rate_hz": 0.1}, "from 1 to"),
        ({"rate_hz": 1e5, "duration_s": 1e4}, "from 1 to"),
    ],
)
def test_plans_that_cannot_be(changes: dict[str, object], message: str) -> None:
    values: dict[str, object] = {"rate_hz": 10, "duration_s": 1, **changes}
    with pytest.raises(RefusedSetting, match=message):
        LoadPlan(**values)  # type: ignore[arg-type]  # wrong on purpose


def test_a_mistake_of_our_own_is_no_failure_of_the_server() -> None:
    def broken(index: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_load([broken], LoadPlan(10, 1), SimulatedClock())
