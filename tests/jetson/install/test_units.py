"""What systemd makes of a robot's units, and the account that serves."""

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from small_releases import Host, Robot, sum_bundle

from jetson.install import checking, probation, units
from jetson.install.account import SERVING, ServingAccount
from jetson.install.activation import activate, prove
from jetson.install.bytecode import code_folders, compile_code
from jetson.install.checking import FailedCheck, check_release, unit_command
from jetson.install.probation import FailedProbation, ProbationTerms, prove_or_leave
from jetson.install.store import StoreError
from jetson.install.store_state import read_boot_id
from jetson.install.units import SERVE, UnitSettings, restart, unit_files, write_units
from qvla_export.policies.oft.policy import OftPolicy

# Is there wherever systemd is, and starts what it is told.
PYTHON = Path("/usr/bin/env")
needs_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: Debian's systemd"
)


def settings(**changes: Any) -> UnitSettings:
    # "man:" pages and an account that this machine has not would be complaints of their own.
    return UnitSettings(**{"python": PYTHON, "power_mode": 0, "user": "daemon", **changes})


def analyze(*words: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)


@needs_analyze
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path) -> None:
    paths = write_units(tmp_path, settings(serve_options=("--warmup", "0")))
    assert len(paths) == len(unit_files(settings())) == 8
    said = analyze("verify", "--man=no", *map(str, paths))
    ours = [line for line in said.stderr.splitlines() if "qvla-" in line or str(tmp_path) in line]
    # A Jetson's own tools are on a Jetson.
    assert [line for line in ours if "is not executable" not in line] == []
    assert said.returncode == 0 or ours

    broken = tmp_path / "qvla-broken.service"
    broken.write_text((tmp_path / SERVE).read_text().replace("WatchdogSec=4", "WatchdogSec=soon"))
    assert "Failed to parse" in analyze("verify", "--man=no", str(broken)).stderr


@needs_analyze
def test_the_server_is_exposed_to_little(tmp_path: Path) -> None:
    path = next(path for path in write_units(tmp_path, settings()) if path.name == SERVE)
    said = analyze("security", "--offline=true", "--no-pager", str(path))
    if "exposure level" not in said.stdout:
        pytest.skip(f"systemd is older than 250: {said.stderr}")
    (level,) = re.findall(r"Overall exposure level for \S+: (\d+\.\d)", said.stdout)
    assert float(level) <= 2.5


def test_units_say_what_systemd_must_do() -> None:
    files = unit_files(UnitSettings(Path("/opt/qvla/bin/python"), power_mode=2))
    serve = files[SERVE]
    for line in (
        "Type=notify",
        "WatchdogSec=4",
        "WatchdogSignal=SIGKILL",
        "LimitCORE=0",
        "OnFailure=qvla-rollback.service",
        "StartLimitBurst=3",
        "User=qvla",
        "ExecStart=/opt/qvla/bin/python -m qvla_export serve /var/lib/qvla/current/bundle"
        " --port 8000",
        "ProtectSystem=strict",
    ):
        assert f"\n{line}\n" in serve
    assert "robot rollback --unproven" in serve
    assert "robot verify --if-changed --store /var/lib/qvla" in files["qvla-renew.service"]
    # Whoever serves may not write beside the code: root does, outside of the units' sandbox.
    compiles = "\nExecStart=-+/opt/qvla/bin/python -m jetson.install.bytecode\n"
    assert compiles in files["qvla-renew.service"]
    first = files["qvla-first-boot.service"]
    # The check measures times: under the mode and the clocks that the robot will have.
    steps = ["machine-id", "ssh-keygen -A", "systemd-sysusers", "nvpmodel -m 2", "jetson_clocks"]
    assert sorted(steps, key=first.index) == steps
    assert first.index("jetson_clocks") < first.index("robot verify")


def test_what_a_server_imports_is_compiled_once(tmp_path: Path) -> None:
    packages, elsewhere = tmp_path / "packages", tmp_path / "elsewhere"
    for folder in (packages / "one" / "part", elsewhere):
        folder.mkdir(parents=True)
        (folder / "code.py").write_text("number = 1\n")
    # As a runtime unpacks itself; and a link that leads back.
    (packages / "two").symlink_to(elsewhere)
    (elsewhere / "again").symlink_to(packages)
    (packages / "bad.py").write_text("def\n")
    (packages / "data.txt").write_text("no code\n")
    assert compile_code([packages]) == 3
    sources = [packages / "one" / "part" / "code.py", packages / "two" / "code.py"]
    compiled = [Path(importlib.util.cache_from_source(str(path))) for path in sources]
    before = [path.stat().st_mtime_ns for path in compiled]
    sources[0].write_text("number = 12\n")
    os.utime(sources[0], (1, 1))  # another second than when it was compiled
    assert compile_code([packages]) == 3
    changed = [path.stat().st_mtime_ns != time for path, time in zip(compiled, before, strict=True)]
    assert changed == [True, False]
    assert any((folder / "install" / "bytecode.py").is_file() for folder in code_folders())


@pytest.mark.parametrize("options", [("--token-file", "/etc/t"), ("--token-file=/etc/t",)])
def test_the_client_that_measures_knows_the_token(options: tuple[str, ...]) -> None:
    files = unit_files(settings(serve_options=options))
    assert f" {' '.join(options)} " in files["qvla-probation.service"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"user": "x\nExecStart=/bin/sh"}, "without blanks"),
        ({"serve_options": ("--instruction", "push it")}, "without blanks"),
        ({"python": Path("/home", "nvidia/.venv/bin/python")}, r"hide homes.*PEX_ROOT=/opt/qvla"),
        ({"store": Path("/root", "store")}, r"hide homes.*/root.store lies in one"),
    ],
)
def test_units_that_could_not_work_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(StoreError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    ("shown", "verb"),
    [
        ("ConditionResult=yes\nConditionTimestampMonotonic=5", "try-restart"),
        # Stopped, or never started, by whoever owns the robot.
        ("ConditionResult=no\nConditionTimestampMonotonic=0", "try-restart"),
        ("ConditionResult=no\nConditionTimestampMonotonic=7", "start"),
    ],
)
def test_a_unit_that_waited_for_its_first_release_is_started(
    monkeypatch: pytest.MonkeyPatch, shown: str, verb: str
) -> None:
    calls = []

    def run(words: list[str], **_: object) -> "subprocess.CompletedProcess[str]":
        calls.append(words[1])
        failed = words[1] in ("reset-failed", verb) and refuses
        return subprocess.CompletedProcess(words, int(failed), shown)

    monkeypatch.setattr(units.subprocess, "run", run)
    refuses = False
    restart(None)
    assert not calls
    restart(SERVE)
    assert calls == ["reset-failed", "show", verb]
    refuses = True
    with pytest.raises(StoreError, match=rf"systemctl {verb} {SERVE} failed; see journalctl"):
        restart(SERVE)


@pytest.fixture(scope="module")
def host(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    root = tmp_path_factory.mktemp("units")
    host = Host.new(root / "host")
    bundle = sum_bundle(tiny_policy, root / "bundle", table=64).path
    for name in ("a", "b"):
        host.release(bundle, name)
    return host


@pytest.fixture
def robot(host: Host, tmp_path: Path) -> Robot:
    """A robot on which "a" is proven, and "b" is on probation."""
    robot, boot = Robot.of(host, tmp_path / "store"), read_boot_id()
    for name in ("a", "b"):
        robot.pass_check(robot.install(name).digest)
        activate(robot.store, name, "this-machine", boot)
        if name == "a":
            prove(robot.store, boot)
    return robot


def test_a_release_that_fails_its_client_is_left_and_no_other(
    robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = robot.state().find("a"), robot.state().find("b")
    boot = read_boot_id()

    def fails(*_: object) -> None:
        raise FailedProbation("it shook")

    def fails_late(*_: object) -> None:
        # Somebody goes back, and begins again, while the client measures.
        activate(robot.store, "a", "this-machine", boot)
        raise FailedProbation("its server was restarted")

    terms = ProbationTerms(1, 0.0)
    monkeypatch.setattr(probation, "measure_probation", fails_late)
    with pytest.raises(FailedProbation, match="restarted"):
        prove_or_leave(robot.store, "http://127.0.0.1:1", terms, None)
    assert robot.store.linked("current") == a and robot.state().known(b).standing != "failed"
    activate(robot.store, "b", "this-machine", boot)
    monkeypatch.setattr(probation, "measure_probation", fails)
    proof = prove_or_leave(robot.store, "http://127.0.0.1:1", terms, None)
    assert proof.measured is None and proof.switched.failed == b
    assert robot.store.linked("current") == a
    assert robot.state().known(b).reason == "it shook"


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_what_root_starts_runs_as_the_account_that_serves(
    robot: Robot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert ServingAccount.of(robot.store) is None
    folder = robot.store.root / SERVING
    folder.mkdir()
    assert ServingAccount.of(robot.store) is None  # root's own
    os.chown(folder, 1, -1)  # daemon, on every Linux
    account = ServingAccount.of(robot.store)
    assert account is not None and account.name == "daemon"
    assert "--property=User=daemon" in unit_command(account, tmp_path) or not shutil.which(
        "systemd-run"
    )
    seen = {}

    def run(words: list[str], **options: Any) -> None:
        seen.update(options)
        raise subprocess.TimeoutExpired(words, 1.0)

    monkeypatch.setattr(checking.subprocess, "run", run)
    with robot.store.open(), pytest.raises(FailedCheck):
        check_release(robot.store, "b", "this-machine", read_boot_id())
    assert (seen["user"], seen["group"]) == (1, 1)
    assert seen["env"]["XDG_STATE_HOME"] == seen["env"]["HOME"] == str(folder)
