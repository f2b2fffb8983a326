"""Two profiles against each other: what is a regression, what is not, what must not be compared."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_runs import qvla
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tiny_bundles import make_bundle, mixed_plan

from jetson.board import read_board_state
from jetson.latency.comparison import LatencyComparison, compare_profiles
from jetson.latency.profile import LatencyProfile
from jetson.latency.regression import LatencyRegression, compare_latency
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.bundle import Bundle
from qvla_export.shared.errors import QvlaError

BOARD = replace(read_board_state(), throttling=(), throttle_counts={})


def noise(seed: int, count: int = 200, spread: float = 0.2) -> NDArray[np.float64]:
    samples: NDArray[np.float64] = np.random.default_rng(seed).lognormal(3, spread, count)
    return samples


def profile(name: str, total: NDArray[np.float64], **changes: Any) -> LatencyProfile:
    fields: dict[str, Any] = {
        "samples_ms": {"engine": total * 0.9, "total": total},
        "started_ms": np.arange(len(total)) * 100.0,
        "warmup": 3,
        "first_action_ms": 90.0,
        "load_ms": None,
        "transport": "in-process",
        "bundle_digest": "d",
        "target": "cpu",
        "horizon": 3,
        "versions": {"numpy": "2"},
        "board_before": BOARD,
        "board_after": BOARD,
    }
    return LatencyProfile(name=name, **{**fields, **changes})


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([20, 100, 300]))
def test_the_same_samples_are_never_slower(seed: int, count: int) -> None:
    samples = noise(seed, count, 0.5)
    for paired in (False, True):
        change = compare_latency(profile("a", samples), profile("b", samples), paired, seed=seed)
        assert not change.slower
        change.require_not_slower()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_twice_the_time_is_always_slower(seed: int) -> None:
    change = compare_latency(profile("a", noise(seed)), profile("b", 2 * noise(seed + 1)))
    assert [found.percent for found in change.slower] == [50.0, 90.0]
    with pytest.raises(LatencyRegression, match=r"b is slower than a by more than 5%: p50 \d"):
        change.require_not_slower()


def test_two_runs_of_one_policy_are_rarely_called_slower() -> None:
    called = [
        bool(compare_latency(profile("a", noise(s)), profile("b", noise(1000 + s)), seed=s).slower)
        for s in range(12)
    ]
    assert sum(called) == 0


def test_verdicts_and_what_too_few_samples_say() -> None:
    base = profile("a", noise(1, 1000))
    verdicts = {}
    for factor in (0.5, 1.0, 1.5):
        change = compare_latency(base, profile("b", factor * noise(1, 1000)), paired=True)
        verdicts[factor] = [change.verdict(found) for found in change.spans["total"]]
    assert verdicts == {0.5: ["faster"] * 3, 1.0: ["same"] * 3, 1.5: ["slower"] * 3}
    few = compare_latency(profile("a", noise(1, 50)), profile("b", noise(2, 50)))
    assert [few.verdict(found) for found in few.spans["total"]][1:] == [
        *("needs 100 samples", "needs 1000 samples")
    ]
    wild = compare_latency(profile("a", noise(1, 30, 1.0)), profile("b", noise(2, 30, 1.0)))
    assert wild.verdict(wild.spans["engine"][0]) == "undecided"


def test_pairs_see_what_two_runs_cannot() -> None:
    shared = noise(3, 200, 0.8)
    base, new = profile("a", shared), profile("b", shared * 1.1)
    assert compare_latency(base, new, paired=True).slower
    assert not compare_latency(base, new, paired=False).slower


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"target": "orin-jp6"}, "target: 'cpu' then 'orin-jp6'"),
        ({"transport": "http"}, "transport"),
        ({"board_before": replace(BOARD, model="Another board")}, "machine (model)"),
        ({"board_before": replace(BOARD, cores=BOARD.cores + 1)}, "machine (cores)"),
    ],
)
def test_other_machines_and_targets_are_refused(change: dict[str, Any], said: str) -> None:
    base, new = profile("a", noise(1)), profile("b", noise(2), **change)
    with pytest.raises(QvlaError, match=r"cannot be compared.*--allow-different") as refused:
        compare_latency(base, new)
    assert said in str(refused.value)
    assert any(said in note for note in compare_latency(base, new, allow_different=True).notes)


def test_other_conditions_are_said() -> None:
    hot = replace(BOARD, power_mode="15W", clocks_locked=False, throttling=("cpu-thermal",))
    before = replace(BOARD, power_mode="MAXN", clocks_locked=True, throttle_counts={"core": 3})
    after = replace(before, throttle_counts={"core": 5})
    base = profile("a", noise(1), board_before=before, board_after=after, conditions="1 threads")
    new = profile("b", noise(2), board_before=hot, board_after=hot, versions={"numpy": "3"})
    notes = "\n".join(compare_latency(base, new).notes)
    for said in (
        "power_mode: 'MAXN' then '15W'",
        "clocks_locked: True then False",
        "a: the board was slowed down, core 2 times",
        "b: the board was slowed down, cpu-thermal active",
        "conditions: '1 threads' then ''",
        "version of numpy: '2' then '3'",
    ):
        assert said in notes
    assert compare_latency(profile("a", noise(1)), profile("b", noise(2))).notes == ()


def save(path: Path, *profiles: LatencyProfile) -> Path:
    compare_profiles(profiles).save(path)
    return path


def test_the_command_judges_two_files(tmp_path: Path) -> None:
    base = save(tmp_path / "base.json", profile("w4", noise(1)))
    same = save(tmp_path / "same.json", profile("w4 again", noise(2)))
    slow = save(tmp_path / "slow.json", profile("w4", 2 * noise(3)), profile("w8", noise(3)))
    output = tmp_path / "change.json"
    fine = qvla("compare-latency", base, same, "--output", output)
    assert fine.code == 0 and "w4 -> w4 again, two runs" in fine.out
    (told,) = json.loads(output.read_text())["changes"]
    assert not told["slower"] and not told["paired"] and told["tolerance"] == 0.05
    assert [found["percent"] for found in told["stages"]["total"]] == [50, 90, 99]
    assert told["stages"]["engine"][0]["ratio"]["confidence"] == 0.95
    bad = qvla("compare-latency", base, slow, "--output", output)
    assert bad.code == 2 and "w4 is slower than w4 by more than 5%: p50" in bad.error
    assert json.loads(output.read_text())["changes"][0]["slower"]
    assert qvla("compare-latency", base, slow, "--tolerance", 3).code == 0
    assert qvla("compare-latency", base, slow, "--base", "w4", "--new", "w8").code == 0
    unclear = qvla("compare-latency", slow, save(tmp_path / "x.json", profile("x", noise(1))))
    assert "--base NAME --new NAME" in unclear.error
    assert "no profile is called 'w9'" in qvla("compare-latency", base, slow, "--new", "w9").error
    assert "a share such as 0.05" in qvla("compare-latency", base, same, "--tolerance", -1).error


def test_the_command_judges_one_run_in_pairs(tmp_path: Path) -> None:
    shared = noise(1, 200, 0.8)
    run = save(tmp_path / "run.json", profile("float", shared), profile("w4", shared * 1.2))
    judged = qvla("compare-latency", run)
    assert judged.code == 2 and "w4 is slower than float" in judged.error
    assert "rounds of one run" in judged.out
    # The other way round it is faster.
    assert qvla("compare-latency", run, "--base", "w4").code == 0
    alone = save(tmp_path / "alone.json", profile("float", shared))
    assert "give two files" in qvla("compare-latency", alone).error


@pytest.mark.parametrize("text", ["", "[]", "7", '{"format": "qvla.latency/2"}', "[" * 99_999])
def test_hostile_files_are_one_line(tmp_path: Path, text: str) -> None:
    good, bad = save(tmp_path / "good.json", profile("a", noise(1))), tmp_path / "bad.json"
    bad.write_text(text)
    assert "bad.json" in qvla("compare-latency", good, bad).error


@pytest.fixture(scope="module")
def bundle(
    tiny_policy: OftPolicy,
    tiny_observations: Callable[..., Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    path = tmp_path_factory.mktemp("profiled") / "bundle"
    return make_bundle(tiny_policy, mixed_plan(tiny_policy), tiny_observations(2), path)


def test_a_bundle_is_profiled_exported_and_compared(bundle: Bundle, tmp_path: Path) -> None:
    output, times, layers = (tmp_path / f"{name}.json" for name in ("run", "times", "layers"))
    done = qvla(
        "profile", bundle.path, "--output", output, "--samples", 25, "--warmup", 2,
        "--threads", 1, "--rate", 0.001, "--execute", 2, "--cold-starts", 1, "--layer-passes", 3,
        "--exportTimes", times, "--export-profile", layers,
    )  # fmt: skip
    assert done.code == 0, done.err
    for said in ("engine.policy", "max of 25", "by width", "4 bits", "most in a row"):
        assert said in done.out
    run = LatencyComparison.load(output)
    (measured,) = run.profiles
    assert measured.load_ms is not None and measured.conditions == "1 threads, packed"
    assert run.deadline is not None and run.deadline.misses(measured.samples_ms["total"]).count == 0
    (start,) = run.cold_starts[measured.name]
    assert start.load_ms > 0 and start.first_action_ms > 0
    rows = json.loads(times.read_text())
    np.testing.assert_allclose(
        [row["computeMs"] for row in rows], measured.samples_ms["engine.policy"], atol=2e-6
    )
    assert json.loads(layers.read_text())[0] == {"count": 3}
    assert qvla("compare-latency", output, output, "--tolerance", 0.5).code == 0


def test_what_cannot_be_measured_is_said_before_measuring(bundle: Bundle, tmp_path: Path) -> None:
    output = tmp_path / "run.json"
    two = qvla("profile", bundle.path, bundle.path, "--output", output, "--exportTimes", output)
    assert "hold one engine, got 2 policies" in two.error
    url = qvla("profile", "http://127.0.0.1:1", "--output", output, "--layers")
    assert "need bundle folders, not ['http://127.0.0.1:1']" in url.error
    rate = qvla("profile", bundle.path, "--output", output, "--rate", 0)
    assert "rate above 0 Hz" in rate.error and not output.exists()
