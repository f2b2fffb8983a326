"""robots.toml, waves and what a push remembers: read strictly, refused by name; hostile robots."""

import json
import os
import stat
import sys
import threading
from dataclasses import fields
from pathlib import Path

import pytest
from command_runs import qvla
from places import ROOT
from small_releases import Host, sum_bundle

from jetson.errors import RemoteError
from jetson.install.release_source import NoSuchFile, StreamedSource
from qvla_export.pipeline.fleet.push import PushRequest, plan_push, push
from qvla_export.pipeline.fleet.push_state import PushState, RobotOutcome
from qvla_export.pipeline.fleet.robot_link import ssh_command, update_command
from qvla_export.pipeline.fleet.robots_file import Fleet, RobotSettings
from qvla_export.pipeline.fleet.waves import divide
from qvla_export.policies.oft.policy import OftPolicy
from qvla_export.shared.errors import ArtifactError, QvlaError

_FLEET = """
repository = "."
[defaults]
user = "qvla"
proven_within_s = 60
[groups.line-a]
port = 2222
command = "sudo -n '/opt/my qvla'"
[robots.arm-01]
host = "10.0.0.11"
[robots.arm-02]
group = "line-a"
store = "/srv/a b"
target = "cpu"
healthy = "checked"
"""


def written(folder: Path, text: str = _FLEET) -> Path:
    path = folder / "robots.toml"
    path.write_text(text)
    return path


def test_a_robot_has_its_own_settings_its_groups_and_everyones(tmp_path: Path) -> None:
    fleet = Fleet.load(written(tmp_path))
    first, second = fleet.robots
    assert (first.host, first.settings.user, first.settings.port) == ("10.0.0.11", "qvla", None)
    assert (second.host, second.group, second.settings.port) == ("arm-02", "line-a", 2222)
    assert fleet.repository == tmp_path.absolute() / "."
    words = update_command(second, "d" * 64, ("arm-02", "line-a"))
    assert words == [
        *("sudo", "-n", "/opt/my qvla", "robot", "update", "d" * 64, "--from", "-"),
        *("--group", "arm-02", "--group", "line-a", "--target", "cpu", "--store", "/srv/a b"),
    ]
    assert "--proven-within" in update_command(first, "d" * 64, ())
    ssh = ssh_command(fleet, second, words)
    # Whatever the user's configuration says: these come first.
    assert ssh.index("StrictHostKeyChecking=yes") < ssh.index("--") == len(ssh) - 3
    assert ssh[-2] == "arm-02" and "'/srv/a b'" in ssh[-1]


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("[robots", "is not TOML"),
        (_FLEET + 'hots = "x"', "unknown key 'hots'; known are command, group, healthy, host"),
        ("speed = 3" + _FLEET, "unknown key 'speed'"),
        (_FLEET.replace('"qvla"', '"-oProxyCommand=x"'), "defaults.user: a name is needed"),
        (_FLEET.replace('"10.0.0.11"', '"-oProxyCommand=x"'), "a name or address is needed"),
        (_FLEET.replace('"10.0.0.11"', '"a b"'), "a name or address is needed"),
        (_FLEET.replace("2222", "70000"), "a whole number from 1 to 65535"),
        (_FLEET.replace("2222", '"22"'), "a whole number from 1 to 65535"),
        (_FLEET.replace("60", "-1"), "a number above 0"),
        (_FLEET.replace('"checked"', '"fine"'), "one of ('proven', 'checked')"),
        (_FLEET.replace('"line-a"', '"line-b"'), "one of [groups] is needed: ['line-a']"),
        (_FLEET.replace("robots.arm-01", "robots.line-a"), "cannot both be called 'line-a'"),
        (_FLEET.replace("robots.arm-01", 'robots."../x"'), "a name must match"),
        (_FLEET.replace('"."', '"nowhere"'), "a path that exists"),
        (_FLEET.replace('"/srv/a b"', '"--root"'), "does not begin with a dash"),
        (_FLEET.replace("sudo -n '/opt/my qvla'", 'sudo \\"x'), "the words of a command"),
        (_FLEET.replace('repository = "."', ""), "--repository, is needed"),
        ('repository = "."\n[robots]\n', "at least one robot"),
        (_FLEET.replace('"10.0.0.11"', "3"), "a text of at most"),
        (
            _FLEET + '[robots.arm-03]\nhost = "10.0.0.11"\n',
            "'arm-01' and 'arm-03' have the same host",
        ),
    ],
)
def test_what_is_no_fleet_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    with pytest.raises(ArtifactError) as refused:
        Fleet.load(written(tmp_path, text))
    assert rule in str(refused.value) and "robots.toml" in str(refused.value)


@pytest.mark.parametrize(
    ("count", "sizes", "stops"),
    [
        (6, ("1", "20%", "100%"), [1, 2, 6]),
        (3, ("1", "20%", "100%"), [1, 3]),
        (1, ("1", "20%", "100%"), [1]),
        (10_000, ("1", "20%", "100%"), [1, 2000, 10_000]),
        (6, ("2",), [2]),
        (6, ("100",), [6]),
    ],
)
def test_waves_say_how_many_are_up_to_date(
    count: int, sizes: tuple[str, ...], stops: list[int]
) -> None:
    waves = divide(count, sizes)
    assert [wave.stop for wave in waves] == stops
    assert [wave.start for wave in waves] == [0, *stops[:-1]]


@pytest.mark.parametrize("sizes", [("0",), ("0%",), ("101%",), ("x",), ("",), ("3", "1"), ("-1",)])
def test_waves_that_are_none_are_refused(sizes: tuple[str, ...]) -> None:
    with pytest.raises(QvlaError, match="--wave"):
        divide(6, sizes)


def test_a_push_remembers_and_one_runs_at_a_time(tmp_path: Path) -> None:
    robots = written(tmp_path)
    state = PushState.beside(robots)
    assert state.done("arm-01", "d") is None
    state.add(RobotOutcome("arm-01", "d", "healthy", "", 7, 1))
    state.add(RobotOutcome("arm-02", "d", "failed", "it shakes", 7, 1))
    again = PushState.beside(robots)
    assert again.done("arm-01", "d") == RobotOutcome("arm-01", "d", "healthy", "", 7, 1)
    assert again.done("arm-01", "e") is None and again.done("arm-02", "d") is None
    with (
        state.held(),
        pytest.raises(QvlaError, match="another push holds"),
        again.held(),
    ):
        pass
    for text in ("{", '{"format": "qvla-push-9", "robots": {}}', '{"format": "qvla-push-1"}'):
        state.path.write_text(text)
        with pytest.raises(ArtifactError):
            PushState.beside(robots)


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
    text = _FLEET.replace('"."', f'"{host.repository.root}"')
    return written(tmp_path, text)


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

    def hand_out() -> None:
        with os.fdopen(requests[0], "rb") as asked, os.fdopen(answers[1], "wb") as out:
            for line in asked:
                message = json.loads(line)
                if message["get"] == "absent":
                    out.write(b'{"nbytes": null}\n')
                elif message["get"] == "odd":
                    out.write(b'{"nbytes": -3}\n')
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
    with pytest.raises(RemoteError, match="another language"):
        list(patient.stream("odd"))
    with pytest.raises(RemoteError, match="said nothing"):
        source._read(1)
    os.close(requests[1])
    thread.join()
    with pytest.raises(RemoteError, match="hung up"):
        patient._read(1)
    with pytest.raises(RemoteError, match="is gone"):
        list(patient.stream("file"))
    os.close(answers[0])


def test_the_page_names_every_setting_and_its_example_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "fleet.md").read_text()
    assert not [one.name for one in fields(RobotSettings) if f"`{one.name}`" not in page]
    example = page.partition("```toml\n")[2].partition("```")[0]
    for name in ("repository", "known_hosts", "keys/fleet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    fleet = Fleet.load(written(tmp_path, example))
    assert [robot.name for robot in fleet.robots] == ["arm-01", "arm-02"]
    assert fleet.robots[1].settings.user == "operator"
