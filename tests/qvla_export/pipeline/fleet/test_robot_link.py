"""What a robot at the other end of ssh may say and ask for; how a stream carries files."""

import json
import os
import stat
import sys
import threading
from pathlib import Path

import pytest
from command_runs import qvla
from robots_files import FLEET, robots_file
from small_releases import Host, sum_bundle

from jetson.errors import RemoteError
from jetson.install.release_source import NoSuchFile, StreamedSource
from qvla_export.pipeline.fleet.push import PushRequest, plan_push, push
from qvla_export.pipeline.fleet.push_state import RobotOutcome
from qvla_export.policies.oft.policy import OftPolicy


@pytest.fixture(scope="module")
def host(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    root = tmp_path_factory.mktemp("host")
    host = Host.new(root / "host")
    host.release(sum_bundle(tiny_policy, root / "a", table=64).path, "good")
    return host


@pytest.fixture
def fleet(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fleet whose ssh is a program `ssh` of the test's."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    text = FLEET.replace('"."', f'"{host.repository.root}"')
    return robots_file(tmp_path, text)


def speak(folder: Path, script: str) -> None:
    """Write an `ssh` that is a robot."""
    program = folder / "ssh"
    program.write_text(f"#!{sys.executable}\nimport json, os, sys, time\n{script}")
    program.chmod(program.stat().st_mode | stat.S_IEXEC)


def outcome_of(robots: Path) -> RobotOutcome:
    plan = plan_push(PushRequest(robots, waves=("1",)))
    result = push(plan, sleep=lambda seconds: None)
    assert result.passed == (result.waves[0].robots[0].answer == "healthy")
    return result.waves[0].robots[0]


@pytest.mark.parametrize(
    "name",
    ["../keys/root.pem", "/etc/passwd", "metadata/../../keys/1.root.json", "keys/x", "", 3,
     "metadata/.hidden", "targets/blobs/..", "metadata\n/x"],
)  # fmt: skip
def test_a_robot_gets_nothing_but_the_repository(fleet: Path, name: object) -> None:
    (fleet.parent / "name.json").write_text(json.dumps({"get": name, "offset": 0}))
    place = json.dumps(str(fleet.parent))
    speak(
        fleet.parent,
        f"folder = {place}\n"
        "print(open(folder + '/name.json').read(), flush=True)\n"
        "open(folder + '/got', 'wb').write(sys.stdin.buffer.read())\n",
    )
    outcome = outcome_of(fleet)
    assert outcome.answer == "failed" and "which no repository has" in outcome.reason
    assert outcome.sent_bytes == 0


@pytest.mark.parametrize(
    ("script", "answer", "reason"),
    [
        ("print('hello')", "failed", "status 0 and no answer"),
        ("sys.exit(127)", "failed", "status 127"),
        ("sys.exit(255)", "unreachable", "the connection ended"),
        ("print('Host key verification failed.', file=sys.stderr); sys.exit(255)",
         "unreachable", "its host key is not known"),
        ("print('x: Permission denied (publickey).', file=sys.stderr); sys.exit(255)",
         "unreachable", "set `user` and `key`"),
        ("print(json.dumps({'ok': True, 'digest': 'x', 'standing': 'proven'}))",
         "failed", "it answers for release x"),
        ("print(json.dumps({'ok': True}))", "failed", "it answers for release None"),
        ("print(json.dumps({'ok': False, 'error': 'no room'}))", "failed", "no room"),
        ("print(json.dumps({'ok': False, 'error': 'another command', 'refused': 'busy'}))",
         "failed", "another command"),
        ("print('[' * 100000)", "failed", "no answer"),
        ("print('{\"ok\": 1}')", "failed", "no answer"),
        ("d = sys.argv[-1].split()[3]\n"
         "print(json.dumps({'ok': True, 'digest': d, 'standing': 'probation'}))",
         "failed", "the release is probation"),
        ("d = sys.argv[-1].split()[3]\nprint('{\"stage\": \"check\"}')\n"
         "print(json.dumps({'ok': True, 'digest': d, 'standing': 'proven'}, indent=1))",
         "healthy", ""),
        ("while True: print('{\"get\": \"metadata/none\", \"offset\": 0}', flush=True)",
         "failed", "more files than a release has"),
    ],
)  # fmt: skip
def test_an_answer_is_healthy_or_says_why_not(
    fleet: Path, monkeypatch: pytest.MonkeyPatch, script: str, answer: str, reason: str
) -> None:
    monkeypatch.setattr("qvla_export.pipeline.fleet.robot_link._MOST_REQUESTS", 20)
    speak(fleet.parent, script)
    outcome = outcome_of(fleet)
    assert (outcome.answer, reason in outcome.reason) == (answer, True), outcome
    hopeless = "key" in outcome.reason
    tries = 5 if (answer == "unreachable" and not hopeless) or "another" in reason else 1
    assert outcome.connections == tries


def test_a_robot_that_never_ends_is_left(fleet: Path) -> None:
    fleet.write_text(fleet.read_text().replace("proven_within_s = 60", "within_s = 0.5"))
    speak(fleet.parent, "time.sleep(600)")
    outcome = outcome_of(fleet)
    assert outcome.answer == "unreachable" and "has not ended after 0 s" in outcome.reason


def test_a_plan_asks_nobody(fleet: Path, host: Host) -> None:
    speak(fleet.parent, "sys.exit(9)")
    outcome = qvla("push", fleet, "--dry-run", "--json")
    document = json.loads(outcome.out)
    assert outcome.code == 0 and [wave["size"] for wave in document["waves"]] == ["1", "100%"]
    assert document["waves"][0]["robots"][0]["release"] == "good"
    text = qvla("push", fleet, "--dry-run", "--wave", "2").out
    assert "arm-01 (10.0.0.11): good" in text and "at most 0.0" in text
    assert not list(fleet.parent.glob("*.push.*"))
    stopped = qvla("push", fleet)
    assert stopped.code == 1 and "wave 1: STOPPED, 0 of 1 healthy" in stopped.out
    assert "1 robots were not touched" in stopped.out
    bad = fleet.read_text().replace('target = "cpu"', 'target = "orin-jp7"')
    fleet.write_text(bad)
    refused = qvla("push", fleet, "--dry-run")
    assert refused.code == 2 and "robot 'arm-02': wrong target" in refused.error


def test_a_stream_carries_files_and_is_not_waited_for_for_ever() -> None:
    requests, answers = os.pipe(), os.pipe()
    source = StreamedSource(answers[0], requests[1], silence_s=0.05)
    data = os.urandom(300_000)
    odd = {"negative": b'{"nbytes": -3}', "none": b"{}", "list": b"[]", "deep": b"[" * 4000}

    def hand_out() -> None:
        with os.fdopen(requests[0], "rb") as asked, os.fdopen(answers[1], "wb") as out:
            for line in asked:
                message = json.loads(line)
                if message["get"] == "absent":
                    out.write(b'{"nbytes": null}\n')
                elif message["get"] in odd:
                    out.write(odd[message["get"]] + b"\n")
                else:
                    rest = data[message["offset"] :]
                    out.write(json.dumps({"nbytes": len(rest)}).encode() + b"\n" + rest)
                out.flush()

    thread = threading.Thread(target=hand_out)
    thread.start()
    patient = StreamedSource(answers[0], requests[1])
    assert b"".join(patient.stream("file", 1000)) == data[1000:]
    assert b"".join(patient.stream("file", len(data))) == b""
    with pytest.raises(NoSuchFile):
        list(patient.stream("absent"))
    for name in odd:
        with pytest.raises(RemoteError, match="another language"):
            list(patient.stream(name))
    with pytest.raises(RemoteError, match="said nothing"):
        source._read(1)
    os.close(requests[1])
    thread.join()
    with pytest.raises(RemoteError, match="hung up"):
        patient._read(1)
    with pytest.raises(RemoteError, match="is gone"):
        list(patient.stream("file"))
    os.close(answers[0])
