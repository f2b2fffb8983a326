"""A robot's units under a systemd that boots: a good release is switched to, a bad one is left.

How long each takes is printed. A robot is to be back within 10 s and silent for 2 s at most; what
else a machine does must not fail a test, so that is read off idle cores.
"""

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from booted_robot import BootedRobot, Seen, lacking
from small_releases import Host, sum_bundle
from systemd_roots import SUITES

from jetson.install.release import Release
from jetson.install.units import SERVE
from qvla_export.policies.oft.policy import OftPolicy

_READS = """
from pathlib import Path
from engines.trt.seal import read_sealed
print(read_sealed(Path("/var/lib/qvla/engines/it"), "it", ""))
"""
_SEALS = """
import subprocess, sys
from pathlib import Path
from jetson.install.account import ServingAccount
from jetson.install.store import Store
folder = Path("/var/lib/qvla/engines")
account = ServingAccount.of(Store(folder.parent))
account.own(folder)
write = '''
from pathlib import Path
from engines.trt.seal import write_sealed
write_sealed(Path("/var/lib/qvla/engines/it"), {"built": "here"})
'''
words = [sys.executable, "-c", write]
subprocess.run(words, check=True, env=account.environment, **account.process())
"""
PLACE = os.environ.get("QVLA_SYSTEMD")
NAMES = ("good", "better", "hang", "crash", "broken", "gone", "restarted", "worn", "tried")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(
        PLACE is None, reason="needs systems with systemd: see tests/helpers/systemd_roots.py"
    ),
    pytest.mark.skipif(lacking() is not None, reason=str(lacking())),
]


@dataclass(frozen=True)
class Case:
    """A robot that serves a proven release, and the releases that it can get."""

    suite: str
    robot: BootedRobot
    # Bundle digests by name.
    bundles: dict[str, str]

    def current(self) -> tuple[str, str]:
        """Return the name and the standing of what is current."""
        now = self.robot.qvla("status")["current"]
        return now["name"], now["standing"]

    def prepare(self, name: str) -> None:
        """Install and check a release."""
        self.robot.qvla("install", name)
        self.robot.qvla("verify", name, "--samples", "20")

    def activate(self, name: str) -> None:
        """Let a checked release serve."""
        self.robot.qvla("activate", name, "--restart-unit", SERVE)

    def begin(self, seen: Seen, name: str) -> None:
        """Prepare a release and let it serve; returns once it answers."""
        self.prepare(name)
        since_s = time.monotonic()
        self.activate(name)
        self.robot.until(lambda: seen.serves(self.bundles[name], since_s))

    def kill(self, name: str) -> float:
        """Send the server a signal; return when."""
        self.robot.systemctl("kill", "--kill-whom=main", f"--signal={name}", SERVE)
        return time.monotonic()

    def say(self, what: str, seconds: float) -> None:
        """Print a figure."""
        print(f"\nsystemd {SUITES[self.suite]}: {what} {seconds:.2f} s")

    def back(self, seen: Seen, since_s: float, what: str, name: str = "good") -> None:
        """Wait until a release answers again, and say after how long."""
        self.robot.until(lambda: seen.serves(self.bundles[name], since_s))
        at = seen.serves(self.bundles[name], since_s)
        assert at is not None
        self.say(f"{what}: the release before answers after", at - since_s)

    def left(self, name: str) -> str:
        """Return why a release was left."""
        (one,) = (r for r in self.robot.qvla("list")["releases"] if r["name"] == name)
        return str(one["reason"]) if one["standing"] == "failed" else ""


@pytest.fixture(scope="module")
def host(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    root = tmp_path_factory.mktemp("host")
    host = Host.new(root / "host")
    for i, name in enumerate(NAMES):
        bundle = sum_bundle(tiny_policy, root / name, i / 8, table=64, servable=True)
        host.release(bundle.path, name)
    return host


@pytest.fixture(scope="module", params=sorted(SUITES))
def case(
    request: pytest.FixtureRequest, host: Host, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Case]:
    """A robot with "good", proven by its first boot and its probation."""
    assert PLACE is not None
    folder = tmp_path_factory.mktemp("robot")
    # Only pytest's own user may look into its folders: the account that serves must as well.
    for path in (folder, *list(folder.parents)[:3]):
        if path.stat().st_uid == os.getuid() and path != Path("/tmp"):
            path.chmod(0o755)
    robot = BootedRobot(
        Path(PLACE) / request.param, folder / "robot", host.repository.root, host.anchor
    )
    bundles = {name: Release.load(host.root / f"release-{name}").bundle_digest for name in NAMES}
    case = Case(request.param, robot, bundles)
    enable = ("enable", "--now", "qvla-first-boot", "qvla-clocks", SERVE)
    try:
        robot.boot()
        # One is flashed with a release, the other gets its first one while its units wait.
        waits = request.param == "trixie"
        if waits:
            robot.systemctl(*enable)
        robot.qvla(
            "install", "good", "--from", "/opt/repository", "--target", "cpu",
            "--root", "/opt/1.root.json",
        )  # fmt: skip
        if waits:
            robot.qvla("verify", "--samples", "20")
            case.activate("good")
        else:
            robot.systemctl(*enable)
        robot.until(lambda: case.current() == ("good", "proven"))
        yield case
    finally:
        robot.end()
        shutil.rmtree(folder / "robot")


def test_a_first_boot_makes_a_robot(case: Case) -> None:
    robot = case.robot
    assert (robot.store / "first-boot-done").exists()
    calls = (robot.log / "calls").read_text().split("\n")
    assert calls[:2] == ["nvpmodel -m 0", "jetson_clocks"]
    assert robot.call("ls", "/etc/ssh/ssh_host_ed25519_key").returncode == 0
    assert len(robot.call("cat", "/etc/machine-id").stdout.strip()) == 32
    assert robot.call("stat", "-c", "%U", f"/proc/{robot.server()}").stdout == "qvla\n"
    assert {"video", "render"} <= set(robot.call("id", "-Gn", "qvla").stdout.split())
    assert robot.systemctl("list-units", "--failed", "--no-legend") == ""


def test_a_good_switch_is_short_and_a_client_proves_it(case: Case) -> None:
    case.prepare("better")
    with case.robot.watched() as seen:
        case.robot.until(lambda: seen.serves(case.bundles["good"], 0.0))
        since_s = time.monotonic()
        case.activate("better")
        case.robot.until(lambda: seen.serves(case.bundles["better"], since_s))
        silence_s = seen.longest_silence_s(since_s)
        case.say("a good switch: nothing answers for", silence_s)
        case.robot.until(lambda: case.current() == ("better", "proven"))
    case.robot.qvla("rollback", "--reason", "tests go on", "--restart-unit", SERVE)
    assert case.current() == ("good", "proven")


@pytest.mark.parametrize(
    ("name", "how", "reasons"),
    [
        # The client that measures it and the watchdog see it at the same time.
        ("hang", "SIGSTOP", ("service-watchdog", "service-timeout", "after ")),
        ("crash", "SIGKILL", ("service-signal", "after ")),
    ],
)
def test_an_unproven_server_that_fails_is_left(
    case: Case, name: str, how: str, reasons: tuple[str, ...]
) -> None:
    with case.robot.watched() as seen:
        case.begin(seen, name)
        case.back(seen, case.kill(how), f"{how} during probation")
    assert case.current() == ("good", "proven")
    assert case.left(name).startswith(reasons)


def test_a_release_that_does_not_start_is_left(case: Case) -> None:
    case.prepare("broken")
    digest = next(
        one["digest"] for one in case.robot.qvla("list")["releases"] if one["name"] == "broken"
    )
    manifest = case.robot.store / "releases" / digest / "bundle" / "manifest.json"
    manifest.unlink()
    with case.robot.watched() as seen:
        since_s = time.monotonic()
        case.activate("broken")
        case.robot.until(lambda: case.left("broken"))
        case.back(seen, time.monotonic(), "no start, known as failed")
        case.say("no start: nothing answers for", seen.longest_silence_s(since_s))
    assert case.current() == ("good", "proven")
    assert case.left("broken") == "service-exit-code"


def test_a_release_that_is_gone_is_left(case: Case) -> None:
    with case.robot.watched() as seen:
        case.begin(seen, "gone")
        case.robot.qvla("prove")
        (case.robot.store / "current").resolve().rename(case.robot.folder / "elsewhere")
        case.back(seen, case.kill("SIGKILL"), "missing release")
    assert case.current() == ("good", "proven")


def test_a_proven_release_that_fails_again_and_again_is_left(case: Case) -> None:
    with case.robot.watched() as seen:
        case.begin(seen, "worn")
        case.robot.qvla("prove")
        for _ in range(2):
            since_s = case.kill("SIGKILL")
            case.robot.until(lambda s=since_s: seen.serves(case.bundles["worn"], s))  # type: ignore[misc]
        assert case.current() == ("worn", "proven")
        case.back(seen, case.kill("SIGKILL"), "a proven server killed the third time")
    assert case.current() == ("good", "proven")
    assert case.left("worn") == "service-failed"


def test_a_measurement_of_one_release_does_not_end_the_next(case: Case) -> None:
    case.prepare("tried")
    case.prepare("better")
    with case.robot.watched() as seen:
        case.begin(seen, "tried")
        since_s = time.monotonic()
        case.activate("better")
        case.robot.until(lambda: seen.serves(case.bundles["better"], since_s))
        case.robot.until(lambda: case.current() == ("better", "proven"))
        standings = {r["name"]: r["standing"] for r in case.robot.qvla("list")["releases"]}
    assert standings["tried"] == "checked" and standings["good"] == "proven"
    case.robot.qvla("rollback", "--restart-unit", SERVE)


def test_a_restart_of_the_machine_during_probation_goes_back(case: Case) -> None:
    with case.robot.watched() as seen:
        case.begin(seen, "restarted")
    since_s = time.monotonic()
    case.robot.restart()
    with case.robot.watched() as seen:
        case.back(seen, since_s, "restart during probation, the boot included")
    assert case.current() == ("good", "proven")
    assert "restarted during its probation" in case.left("restarted")


def test_what_is_built_is_sealed_for_the_account_that_serves(case: Case) -> None:
    """Root builds as it, so that the server takes its own engines."""
    done = case.robot.call("/opt/qvla/bin/python", "-c", _SEALS)
    assert done.returncode == 0, done.stderr
    words = ("systemd-run", "--wait", "--pipe", "--quiet", "--property=User=qvla")
    state = "--setenv=XDG_STATE_HOME=/var/lib/qvla/serving"
    done = case.robot.call(*words, state, "/opt/qvla/bin/python", "-c", _READS)
    assert done.stdout.strip() == "{'built': 'here'}", done.stderr
