"""robots.toml, waves and what a push remembers: read strictly, refused by name."""

from dataclasses import fields
from pathlib import Path

import pytest
from places import ROOT
from robots_files import FLEET, robots_file

from qvla_export.pipeline.fleet.push_state import PushState, RobotOutcome
from qvla_export.pipeline.fleet.robot_link import ssh_command, update_command
from qvla_export.pipeline.fleet.robots_file import Fleet, RobotSettings
from qvla_export.pipeline.fleet.waves import divide
from qvla_export.shared.errors import ArtifactError, QvlaError


def test_a_robot_has_its_own_settings_its_groups_and_everyones(tmp_path: Path) -> None:
    fleet = Fleet.load(robots_file(tmp_path))
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
        (FLEET + 'hots = "x"', "unknown key 'hots'; known are command, group, healthy, host"),
        ("speed = 3" + FLEET, "unknown key 'speed'"),
        (FLEET.replace('"qvla"', '"-oProxyCommand=x"'), "defaults.user: a name is needed"),
        (FLEET.replace('"10.0.0.11"', '"-oProxyCommand=x"'), "a name or address is needed"),
        (FLEET.replace('"10.0.0.11"', '"a b"'), "a name or address is needed"),
        (FLEET.replace("2222", "70000"), "a whole number from 1 to 65535"),
        (FLEET.replace("2222", '"22"'), "a whole number from 1 to 65535"),
        (FLEET.replace("60", "-1"), "a number above 0"),
        (FLEET.replace('"checked"', '"fine"'), "one of ('proven', 'checked')"),
        (FLEET.replace('"line-a"', '"line-b"'), "one of [groups] is needed: ['line-a']"),
        (FLEET.replace("robots.arm-01", "robots.line-a"), "cannot both be called 'line-a'"),
        (FLEET.replace("robots.arm-01", 'robots."../x"'), "a name must match"),
        (FLEET.replace('"."', '"nowhere"'), "a path that exists"),
        (FLEET.replace('"/srv/a b"', '"--root"'), "does not begin with a dash"),
        (FLEET.replace("sudo -n '/opt/my qvla'", 'sudo \\"x'), "the words of a command"),
        (FLEET.replace('repository = "."', ""), "--repository, is needed"),
        ('repository = "."\n[robots]\n', "at least one robot"),
        (FLEET.replace('"10.0.0.11"', "3"), "a text of at most"),
        (
            FLEET + '[robots.arm-03]\nhost = "10.0.0.11"\n',
            "'arm-01' and 'arm-03' have the same host",
        ),
    ],
)
def test_what_is_no_fleet_is_refused(tmp_path: Path, text: str, rule: str) -> None:
    with pytest.raises(ArtifactError) as refused:
        Fleet.load(robots_file(tmp_path, text))
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
    robots = robots_file(tmp_path)
    state = PushState.beside(robots)
    assert state.done("arm-01", "d") is None
    state.add(RobotOutcome("arm-01", "d", "healthy", "", 7, 1))
    state.add(RobotOutcome("arm-02", "d", "failed", "it shakes", 7, 1))
    again = PushState.beside(robots)
    assert again.done("arm-01", "d") == RobotOutcome("arm-01", "d", "healthy", "", 7, 1)
    assert again.done("arm-01", "e") is None and again.done("arm-02", "d") is None
    with (
        state.hold(),
        pytest.raises(QvlaError, match="another push holds"),
        again.hold(),
    ):
        pass
    for text in ("{", '{"format": "qvla-push-9", "robots": {}}', '{"format": "qvla-push-1"}'):
        state.path.write_text(text)
        with pytest.raises(ArtifactError):
            PushState.beside(robots)


def test_the_page_names_every_setting_and_its_example_is_read(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "fleet.md").read_text()
    assert not [one.name for one in fields(RobotSettings) if f"`{one.name}`" not in page]
    example = page.partition("```toml\n")[2].partition("```")[0]
    for name in ("repository", "known_hosts", "keys/fleet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    fleet = Fleet.load(robots_file(tmp_path, example))
    assert [robot.name for robot in fleet.robots] == ["arm-01", "arm-02"]
    assert fleet.robots[1].settings.user == "operator"
