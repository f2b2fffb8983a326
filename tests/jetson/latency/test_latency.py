"""Latency profiles: what is measured, in which order, and what the figures mean."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines.layer_times import LayerTime, LayerTimes
from jetson.board import read_board_state
from jetson.errors import PolicyFailure
from jetson.latency.cold_start import ColdStart
from jetson.latency.comparison import LatencyComparison, compare_profiles
from jetson.latency.measure import ProfileSubject, profile_latency
from jetson.latency.profile import LatencyProfile
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.policy_contract import PolicyContract
from qvla_export.shared.action import ActionChunk
from qvla_export.shared.errors import ArtifactError, InvalidObservation, QvlaError
from qvla_export.shared.latency_statistics import Deadline
from qvla_export.shared.observation import Observation

CONTRACT = PolicyContract(("image",), 3, 2, 0, "tiny", "d1gest", "cpu")
BOARD = read_board_state()


def observation(value: int) -> Observation:
    return Observation({"image": np.full((4, 4, 3), value, np.uint8)}, "push")


class TimedPolicy:
    """Claims engine times from a list and remembers who was asked what."""

    contract = CONTRACT

    def __init__(self, name: str, engine_ms: list[float], asked: list[tuple[str, int]]) -> None:
        self.name = name
        self._engine_ms = iter(engine_ms)
        self._asked = asked

    def infer(self, observation: Observation) -> ActionChunk:
        self._asked.append((self.name, int(observation.images["image"][0, 0, 0])))
        actions = np.zeros((3, 2), np.float32)
        return ActionChunk(actions, actions, {"preprocess": 0.5, "engine": next(self._engine_ms)})


def profile(name: str, total: Any, **changes: Any) -> LatencyProfile:
    fields: dict[str, Any] = {
        "samples_ms": {"engine": np.asarray(total) / 2, "total": np.asarray(total)},
        "started_ms": np.arange(len(total)) * 100.0,
        "warmup": 3,
        "first_action_ms": 90.0,
        "load_ms": None,
        "transport": "in-process",
        "bundle_digest": "d1gest",
        "target": "cpu",
        "horizon": 3,
        "versions": {"python": "3.11"},
        "board_before": BOARD,
        "board_after": BOARD,
    }
    return LatencyProfile(name=name, **{**fields, **changes})


def test_policies_take_turns_round_by_round() -> None:
    asked: list[tuple[str, int]] = []
    policies = {name: ProfileSubject(TimedPolicy(name, [1.0] * 9, asked)) for name in "abc"}
    done: list[tuple[int, int]] = []
    profile_latency(
        policies,
        [observation(1), observation(2)],
        warmup=1,
        samples=3,
        on_progress=lambda now, all_: done.append((now, all_)),
    )
    rounds = [[name for name, _ in asked[i : i + 3]] for i in range(0, 12, 3)]
    assert all(sorted(names) == list("abc") for names in rounds)
    assert [value for _, value in asked] == [1] * 3 + [2] * 3 + [1] * 3 + [2] * 3
    assert done == [(i, 12) for i in range(1, 13)]


def test_no_policy_always_follows_the_same_other() -> None:
    def order(seed: int) -> str:
        asked: list[tuple[str, int]] = []
        policies = {name: ProfileSubject(TimedPolicy(name, [1.0] * 60, asked)) for name in "abc"}
        profile_latency(policies, [observation(1)], warmup=0, samples=60, seed=seed)
        return "".join(name for name, _ in asked)

    names = order(0)
    assert names == order(0) != order(1)
    before_c = [names[index - 1] for index in range(1, 180) if names[index] == "c"]
    assert 15 < before_c.count("a") < 45 and 15 < before_c.count("b") < 45


def test_warm_up_is_dropped_and_spans_are_the_servers() -> None:
    policy = TimedPolicy("q", [100.0, 50.0, 1.0, 2.0, 3.0, 4.0], [])
    result = profile_latency({"q": ProfileSubject(policy, 750.0)}, [observation(1)], 2, 4)
    (measured,) = result.profiles
    assert list(measured.samples_ms) == ["decode", "preprocess", "engine", "encode", "total"]
    assert measured.samples_ms["engine"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert measured.warmup == 2 and measured.load_ms == 750.0 and measured.horizon == 3
    assert measured.cold_start_ms == 750.0 + measured.first_action_ms
    assert measured.started_ms[0] == 0 and (np.diff(measured.started_ms) > 0).all()
    assert measured.first_action_ms > 0 and measured.transport == "in-process"
    assert (measured.bundle_digest, measured.target) == ("d1gest", "cpu")
    assert measured.versions["numpy"] == np.__version__
    assert measured.board_after.memory_available_bytes is not None
    assert result.ratios == ()


def test_a_server_is_measured_over_its_own_socket() -> None:
    with open_server(TimedPolicy("q", [2.0] * 99, []), ServerSettings(port=0)) as url:
        local = ProfileSubject(TimedPolicy("q", [2.0] * 99, []))
        both = {"local": local, "remote": ProfileSubject(url)}
        result = profile_latency(both, [observation(1)], 1, 10)
    remote = result.profiles[1]
    assert remote.transport == "http" and remote.samples_ms["transport"].min() >= 0
    assert remote.samples_ms["engine"].tolist() == [2.0] * 10
    assert remote.bundle_digest == "d1gest"
    assert [(r.name, r.baseline, r.span) for r in result.ratios] == [
        ("remote", "local", "total"),
        ("remote", "local", "engine"),
    ]


def test_percentiles_come_from_the_raw_samples() -> None:
    measured = profile("a", np.arange(1, 102, dtype=float))
    assert measured.summary_ms()["total"] == {
        "p50": 51.0,
        "p90": 91.0,
        "p99": 100.0,
        "p99.9": None,
        "max": 101.0,
        "jitter_spread": 49.0,
        "jitter_step": 1.0,
    }
    assert measured.percentile_ms(99.5, "engine") == pytest.approx(50.25)
    assert measured.cold_start_ms is None
    with pytest.raises(QvlaError, match="no span 'gpu'"):
        measured.percentile_ms(50, "gpu")


def test_the_ratio_cancels_noise_that_both_saw() -> None:
    generator = np.random.default_rng(3)
    noise = generator.lognormal(0, 0.5, 300)
    slow = profile("float", 10 * noise)
    fast = profile("quantized", 4 * noise * generator.normal(1, 0.01, 300))
    (total, engine) = compare_profiles([slow, fast]).ratios
    found = total.interval
    assert found.value == pytest.approx(0.4, rel=0.02)
    assert found.low <= found.value <= found.high and found.high - found.low < 0.02
    assert (engine.span, engine.baseline) == ("engine", "float")


def test_profiles_of_one_run_are_equally_long_and_told_apart() -> None:
    with pytest.raises(ArtifactError, match="equally many samples"):
        compare_profiles([profile("a", [1.0, 2.0]), profile("b", [1.0])])
    with pytest.raises(ArtifactError, match="names of their own"):
        compare_profiles([profile("a", [1.0]), profile("a", [1.0])])


def test_round_trip(tmp_path: Path) -> None:
    profiles = [profile("a", [1.0, 2.0, 3.0], load_ms=4.5), profile("b", [2.0, 2.5, 3.0])]
    row = LayerTime("policy", "fc1.b4/MatMul", "MatMulNBits", "fc1", 4, np.array([0.001, 0.002]))
    saved = replace(
        compare_profiles(profiles, Deadline(500.0)),
        layers={"a": LayerTimes("onnxruntime 1", (row,))},
        cold_starts={"b": (ColdStart(700.0, 9.5),)},
    )
    saved.save(tmp_path / "latency.json")
    written = json.loads((tmp_path / "latency.json").read_text())
    assert written["profiles"][0]["misses"] == {
        "count": 1,
        "actions": 3,
        "longest_run": 1,
        "share": 1 / 3,
    }
    loaded = LatencyComparison.load(tmp_path / "latency.json")
    assert (loaded.ratios, loaded.deadline) == (saved.ratios, Deadline(500.0))
    assert loaded.layers["a"].to_json() == saved.layers["a"].to_json()
    assert loaded.cold_starts == saved.cold_starts
    assert [p.to_json() for p in loaded.profiles] == [p.to_json() for p in saved.profiles]
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]


def _damage(text: str, change: Any) -> str:
    value = json.loads(text)
    change(value)
    return json.dumps(value)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: v.update(format="qvla.latency/1"),
        lambda v: v.update(format=["qvla.latency/2"]),
        lambda v: v.update(deadline={"rate_hz": -1, "execute": 1}),
        lambda v: v.update(deadline={"rate_hz": "5", "execute": 1}),
        lambda v: v.update(deadline=3),
        lambda v: v.update(layers=[1]),
        lambda v: v.update(layers={"a": {"runtime": "r", "rows": []}}),
        lambda v: v.update(layers={"a": {"runtime": "r", "rows": [{"stage": 1}]}}),
        lambda v: v.update(cold_starts={"a": 3}),
        lambda v: v.update(cold_starts={"a": [{"load_ms": -1, "first_action_ms": 2}]}),
        lambda v: v["profiles"].append(v["profiles"][0]),
        lambda v: v["profiles"][0].update(name=["a"]),
        lambda v: v["profiles"][0].update(horizon=True),
        lambda v: v["profiles"][0].update(first_action_ms=float("inf")),
        lambda v: v["profiles"][0].update(load_ms="1"),
        lambda v: v["profiles"][0].update(versions=None),
        lambda v: v["profiles"][0].update(started_ms=[0.0]),
        lambda v: v["profiles"][0].update(started_ms=None, samples_ms={"total": [[1.0], [2.0]]}),
        lambda v: v["profiles"][0].update(started_ms=3.0, samples_ms={"total": 2.0}),
        lambda v: v.update(profiles=[]),
        lambda v: v.update(profiles=[7]),
        lambda v: v["profiles"][0].pop("samples_ms"),
        lambda v: v["profiles"][0].update(samples_ms=[1, 2]),
        lambda v: v["profiles"][0]["samples_ms"].update(total=[1.0]),
        lambda v: v["profiles"][0]["samples_ms"].update(total=[1.0, "x"]),
        lambda v: v["profiles"][0]["samples_ms"].update(total=[1.0, float("nan")]),
        lambda v: v["profiles"][0]["samples_ms"].update(total=[1.0, -2.0]),
        lambda v: v["profiles"][0]["samples_ms"].update(total=[[1.0], [2.0]]),
        lambda v: v["profiles"][0]["samples_ms"].pop("total"),
        lambda v: v["profiles"][0]["board_after"].pop("kernel"),
        lambda v: v["profiles"][0].update(board_before=None),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, change: Any) -> None:
    path = tmp_path / "latency.json"
    compare_profiles([profile("a", [1.0, 2.0])]).save(path)
    path.write_text(_damage(path.read_text(), change))
    with pytest.raises(ArtifactError, match=r"latency\.json"):
        LatencyComparison.load(path)


def test_an_older_format_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text('{"format": "qvla.latency/1", "profiles": []}')
    with pytest.raises(
        ArtifactError, match=r"latency/2'.*'qvla.latency/1'; measure anew with `qvla"
    ):
        LatencyComparison.load(path)


def test_a_truncated_or_absent_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    with pytest.raises(ArtifactError, match="not found"):
        LatencyComparison.load(path)
    compare_profiles([profile("a", [1.0, 2.0])]).save(path)
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ArtifactError, match="not valid JSON"):
        LatencyComparison.load(path)


def test_a_failing_policy_ends_the_run() -> None:
    with pytest.raises(PolicyFailure, match="StopIteration"):
        profile_latency({"q": ProfileSubject(TimedPolicy("q", [1.0], []))}, [observation(1)], 0, 2)


@pytest.mark.parametrize(
    "change", [{"subjects": {}}, {"observations": []}, {"samples": 0}, {"warmup": -1}]
)
def test_nothing_to_measure_is_said(change: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "subjects": {"q": ProfileSubject(TimedPolicy("q", [1.0] * 9, []))},
        "observations": [observation(1)],
        "samples": 1,
        "warmup": 0,
    }
    with pytest.raises(QvlaError, match="needs policies"):
        profile_latency(**{**given, **change})


def test_observations_of_another_policy_are_refused_before_anything_runs() -> None:
    asked: list[tuple[str, int]] = []
    other = Observation({"top": np.zeros((4, 4, 3), np.uint8)}, "push")
    with pytest.raises(InvalidObservation, match="missing"):
        subject = ProfileSubject(TimedPolicy("q", [1.0] * 9, asked))
        profile_latency({"q": subject}, [observation(1), other], 0, 2)
    assert not asked
