"""`qvla soak`: attacks on a real server and control loop; and a report that notices."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command_runs import qvla
from places import ROOT

from jetson.errors import RemoteError
from jetson.serving.security import TlsFiles
from qvla_export.pipeline.soak.attacks import ATTACKS, mutated
from qvla_export.pipeline.soak.driver import CommandCounts
from qvla_export.pipeline.soak.good_clients import PROTOCOLS, ask
from qvla_export.pipeline.soak.numbered_policy import answers, observation_of
from qvla_export.pipeline.soak.report import (
    ENGINE_FAULTS,
    QUIET,
    STOPPED,
    Promise,
    Sample,
    SoakReport,
)
from qvla_export.pipeline.soak.soak import DISK_FULL, SoakPlan, run_soak
from qvla_export.pipeline.soak.tally import NO_REPLY, Tally, kind_of
from qvla_export.shared.errors import QvlaError


def check(report: SoakReport) -> None:
    """Nothing was broken, and everything was tried."""
    assert report.ok, [promise for promise in report.promises if promise.holds is False]
    for protocol in PROTOCOLS:
        assert report.good[ENGINE_FAULTS, protocol].refused.keys() <= {"engine fault"}
        assert report.good[DISK_FULL, protocol].answered > 0
        assert all(report.attacks[attack, protocol].sent > 0 for attack in ATTACKS)
        mutants = report.attacks["mutated requests", protocol]
        assert mutants.sent == mutants.answered + mutants.refused.total()
        assert mutants.refused.total() > 0
        assert report.attacks["costly requests", protocol].answered == 0
    assert report.commands.taken > 0 and report.commands.expired >= 0
    assert json.loads(json.dumps(report.to_json()))["ok"] is True


def test_half_a_minute_of_attacks_breaks_no_promise() -> None:
    """Whatever else the machine does: no time is asserted, and latency judged on no shared core."""
    heard = []
    report = run_soak(SoakPlan(hours=0.0083, seed=7), lambda told: heard.append(told.work))
    check(report)
    assert [work.removeprefix("soak, ") for work in heard] == SoakPlan(0.0083).phases


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_an_hour_of_attacks_breaks_no_promise(tmp_path: Path) -> None:
    outcome = qvla("soak", "--hours", 1, "--seed", 11, "--output", tmp_path / "soak.json")
    print(outcome.out)
    assert outcome.code == 0, outcome.out


@pytest.mark.slow
def test_attacks_on_an_encrypted_server(tmp_path: Path) -> None:
    if shutil.which("openssl") is None:
        pytest.skip("no openssl command to make a certificate with")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-keyout", "key.pem", "-out", "cert.pem", "-subj", "/CN=robot"),
            *("-addext", "subjectAltName=IP:127.0.0.1,DNS:localhost"),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    tls = TlsFiles(tmp_path / "cert.pem", tmp_path / "key.pem")
    report = run_soak(SoakPlan(0.0083, 3, tls))
    check(report)
    assert report.encrypted


def small_report(**changes: object) -> SoakReport:
    def tallies(*phases: str) -> dict[tuple[str, str], Tally]:
        return {
            (phase, name): Tally(2000, 2000, Counter(), Counter(), [1.0] * 2000)
            for phase in phases
            for name in PROTOCOLS
        }

    report = SoakReport(
        hours=1.0,
        seed=0,
        attacker="on core 1",
        encrypted=False,
        good=tallies(QUIET, "slow peers", ENGINE_FAULTS),  # type: ignore[arg-type]
        attacks=tallies("slow peers"),  # type: ignore[arg-type]
        samples=[Sample(0.0, 100_000_000, 30), Sample(3600.0, 105_000_000, 31)],
        commands=CommandCounts(taken=10),
        faults=[],
        has_own_core=True,
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def change_tally(report: SoakReport, change: Callable[[Tally], object]) -> SoakReport:
    change(report.good["slow peers", "act"])
    return report


@pytest.mark.parametrize(
    ("broken", "promise"),
    [
        (lambda: change_tally(small_report(), lambda t: t.wrong.update(["x"])), "no wrong answer"),
        (lambda: change_tally(small_report(), lambda t: t.refuse("are waiting")), "refused"),
        (lambda: change_tally(small_report(), lambda t: setattr(t, "answered", 0)), "every phase"),
        (
            lambda: change_tally(small_report(), lambda t: t.times_ms.extend([4.0] * 30)),
            "p99 under attack",
        ),
        (
            lambda: small_report(samples=[Sample(0, 100, 30), Sample(9, 111, 30)]),
            "within 10 %",
        ),
        (lambda: small_report(samples=[Sample(0, 9, 30), Sample(9, 9, 99)]), "descriptors"),
        (lambda: small_report(commands=CommandCounts(taken=9, too_old=1)), "no command"),
        (lambda: small_report(commands=CommandCounts(taken=9, bursts=1)), "no command"),
        (lambda: small_report(commands=CommandCounts()), "no command"),
        (lambda: small_report(faults=["the server ended with 1"]), "nothing died"),
    ],
)
def test_each_broken_promise_is_told(
    broken: Callable[[], SoakReport], promise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = broken()
    told = [one.text for one in report.promises if one.holds is False]
    assert len(told) == 1 and promise in told[0] and not report.ok
    monkeypatch.setattr("qvla_export.pipeline.soak.soak.run_soak", lambda *_: report)
    outcome = qvla("soak", "--hours", 1)
    assert outcome.code == 1 and f"BROKEN: {told[0]}" in outcome.out


def test_a_report_without_faults_holds_and_says_what_was_not_judged() -> None:
    assert small_report().ok and all(p.holds for p in small_report().promises)
    shared = small_report(has_own_core=False)
    (latency,) = [p for p in shared.promises if p.holds is None]
    assert shared.ok and "share a core" in latency.figure
    assert abs(small_report().slope("resident_bytes")) < 1e9


def latency(report: SoakReport) -> Promise:
    (promise,) = [one for one in report.promises if "p99 under attack" in one.text]
    return promise


def test_a_stopped_server_s_few_replies_keep_latency_from_no_judgement() -> None:
    report = small_report()
    stopped = {
        (STOPPED, name): Tally(9, 9, Counter(), Counter(), [900.0] * 9) for name in PROTOCOLS
    }
    with_pauses = replace(report, good={**report.good, **stopped})
    assert with_pauses.ok and all(promise.holds for promise in with_pauses.promises)
    del report.good[QUIET, "act"].times_ms[400:]  # type: ignore[index]
    assert latency(report).holds is None and "too few replies" in latency(report).figure


def test_an_attack_that_leaves_few_replies_is_judged_by_those() -> None:
    report = small_report()
    report.good["slow peers", "act"].times_ms[:] = [900.0] * 9
    assert latency(report).holds is False and "(slow peers, act)" in latency(report).figure


def test_phases_whose_latency_is_judged_and_those_left_out_are_named() -> None:
    tally = Tally(2000, 2000, Counter(), Counter(), [1.0] * 2000)
    phases = [*dict.fromkeys(SoakPlan(1.0).phases)]
    good = {(phase, name): tally for phase in phases for name in PROTOCOLS}
    judged, left_out = latency(small_report(good=good)).figure.split("; left out")
    assert left_out.endswith(f": {ENGINE_FAULTS}, {STOPPED}")
    named = judged.split(" of ")[1].split(", ")
    assert {*named} == {*phases} - {QUIET, ENGINE_FAULTS, STOPPED} and {*ATTACKS} <= {*named}


def test_faults_of_the_engine_are_no_refusals_of_good_clients() -> None:
    report = small_report()
    report.good[ENGINE_FAULTS, "act"].refuse("the policy failed: RuntimeError")
    assert report.ok
    report.good["slow peers", "act"].refuse("the policy failed: RuntimeError")
    assert not report.ok


class OneClient:
    """Answers as it is told to."""

    def __init__(self, reply: np.ndarray | Exception) -> None:
        self.reply = reply

    def ask(self, observation: object) -> np.ndarray:
        if isinstance(self.reply, Exception):
            raise self.reply
        return self.reply

    def close(self) -> None:
        pass


def actions_of(client: int, request: int) -> np.ndarray:
    actions = np.zeros((8, 4), np.float32)
    actions[:, :2] = observation_of(client, request).state
    return actions


@pytest.mark.parametrize(
    ("reply", "count"),
    [
        (actions_of(1, 7), "answered"),
        (actions_of(1, 6), "the answer to another request"),
        (actions_of(2, 7), "the answer to another request"),
        (np.full((8, 4), np.nan, np.float32), "the answer to another request"),
        (RemoteError("POST http://127.0.0.1:1/act failed: ReadTimeout: x"), NO_REPLY),
        (RemoteError("tcp://127.0.0.1:1 gave no reply within 60 s"), NO_REPLY),
        (RemoteError("http://127.0.0.1:1/act answered 503: 16 requests are waiting"), "busy"),
        (RemoteError("ws://127.0.0.1:1: PolicyFailure: the policy failed: x"), "engine fault"),
        (RemoteError("ws://127.0.0.1:1: ServerFailure: the server failed: x"), "ServerFailure"),
    ],
)
def test_what_comes_back_is_counted_as_what_it_is(
    reply: np.ndarray | Exception, count: str
) -> None:
    tally = Tally()
    ask(OneClient(reply), 1, 7, tally)
    assert tally.sent == 1
    if count == "answered":
        assert tally.answered == 1 and len(tally.times_ms) == 1
    elif count in ("busy", "engine fault"):
        assert tally.refused == {count: 1}
    else:
        assert count in next(iter(tally.wrong)) and not tally.answered


def test_numbers_of_requests_survive_float32() -> None:
    for client in (1, 3, 63):
        for request in (0, 1, 1023, 999_999):
            assert answers(actions_of(client, request), client, request)
            assert not answers(actions_of(client, request), client, request + 1)


def test_reasons_are_sorted() -> None:
    assert kind_of("422: the prompt may have 256 tokens") == "too much"
    assert kind_of("400: the body must be JSON") == "malformed"
    assert kind_of("something else") == "other"


def test_a_seed_gives_the_same_mutations() -> None:
    import random

    first, again = (
        [mutated(b"0123456789" * 9, random.Random(5)) for _ in range(9)] for _ in range(2)
    )
    assert first == again and len(set(first)) == 1


def test_hours_are_bounded_and_long_runs_have_rounds() -> None:
    for hours in (0.0, -1.0, float("nan"), 0.001):
        with pytest.raises(QvlaError, match="--hours must be at least"):
            SoakPlan(hours)
    assert SoakPlan(24.0).phases.count("slow peers") > 50
    assert SoakPlan(24.0).phases.count(DISK_FULL) == 1
    assert SoakPlan(0.01).phases[0] == QUIET


def test_a_driver_counts_what_it_should_never_get() -> None:
    from jetson.control.sinks import Command

    def command(value: float, observed_s: float | None) -> Command:
        return Command(1, np.full(4, value, np.float32), 10.0, observed_s, "running", 11.0)

    counts = CommandCounts()
    counts.take(command(0.5, 9.9), 10.1)
    assert counts.taken == 1 and counts.broken == 0
    counts.take(command(0.5, 9.0), 10.1)
    counts.take(command(np.nan, 10.0), 10.1)
    counts.take(command(1.5, None), 10.1)
    assert (counts.too_old, counts.non_finite, counts.out_of_limits) == (1, 1, 1)


def test_a_driver_s_account_has_a_burst_of_two() -> None:
    """Two lines in the pipe before it looks; the loop's own sink writes the second for no one."""
    value = {"slot": 1, "action": [0.0] * 4, "sent_s": 1.0, "observed_s": None}
    line = json.dumps({**value, "deadline_s": 9.0, "state": "running"}).encode() + b"\n"
    for lines, bursts in ((line, 0), (line * 2, 1)):
        outcome = subprocess.run(
            [sys.executable, "-m", "qvla_export.pipeline.soak.driver"],
            cwd=ROOT,
            input=lines,
            capture_output=True,
            check=True,
        )
        counts = CommandCounts(**json.loads(outcome.stdout))
        assert counts.bursts == counts.broken == bursts and counts.expired == 1
