"""A release that crashes, hangs or is too slow: the one before it serves again."""

import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from echo_policy import OFT, EchoPolicy
from ports import free_port
from small_releases import BOOT, MACHINE, Host, Robot, sum_bundle

from jetson.clients.http_client import RemotePolicy
from jetson.errors import RemoteError
from jetson.install import checking, probation, supervision, update
from jetson.install.activation import activate, prove, roll_back
from jetson.install.garbage import collect
from jetson.install.installation import InstallRequest
from jetson.install.probation import FailedProbation, ProbationTerms, measure_probation
from jetson.install.store import StoreError
from jetson.install.supervision import SupervisionEnd, SupervisionSettings, supervise
from jetson.server import open_server
from jetson.server_settings import ServerSettings
from jetson.serving.systemd_notify import notify, signs_of_life, watchdog_s
from qvla_export.policies.oft.policy import OftPolicy

# A server that does what the name of its release says.
_SERVER = """
import http.server, json, pathlib, sys, time
bundle, port, log = pathlib.Path(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])
name = json.loads((bundle.parent / "release.json").read_text())["name"]
with log.open("a") as file:
    file.write(name + "\\n")
if name == "crash":
    sys.exit(7)
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        ready = name != "hang"
        if name == "late" and time.monotonic() - start > 0.5:
            ready = False
        self.send_response(200 if ready else 503)
        self.end_headers()
    def log_message(self, *a): pass
start = time.monotonic()
http.server.HTTPServer(("127.0.0.1", port), Ready).serve_forever()
"""
NAMES = ("good", "crash", "hang", "late", "better")


@pytest.fixture(scope="module")
def host(tiny_policy: OftPolicy, tmp_path_factory: pytest.TempPathFactory) -> Host:
    root = tmp_path_factory.mktemp("supervision")
    host = Host.new(root / "host")
    bundle = sum_bundle(tiny_policy, root / "bundle", table=64, servable=True).path
    for name in NAMES:
        host.release(bundle, name)
    return host


@pytest.fixture
def robot(host: Host, tmp_path: Path) -> Robot:
    """A robot on which "good" is proven and serves, and the others were checked."""
    robot = Robot.of(host, tmp_path / "store")
    for name in NAMES:
        robot.pass_check(robot.install(name).digest)
    with robot.store.open():
        activate(robot.store, "good", MACHINE, BOOT)
        prove(robot.store, BOOT)
    return robot


def current(robot: Robot) -> tuple[str, str]:
    digest = robot.store.linked("current")
    assert digest is not None
    release = robot.state().releases[digest]
    return release.name, release.standing


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.02)


@contextmanager
def supervised(robot: Robot, log: Path, **settings: object) -> Iterator[threading.Thread]:
    port = free_port()

    def command(bundle: Path) -> list[str]:
        return [sys.executable, "-S", "-c", _SERVER, str(bundle), str(port), str(log)]

    chosen = SupervisionSettings(
        **{  # type: ignore[arg-type]  # of every field its own
            "command": command,
            "url": f"http://127.0.0.1:{port}",
            "boot_id": lambda: BOOT,
            "machine": lambda: MACHINE,
            "measure": lambda *_: None,
            "start_s": 20.0, "hang_s": 0.3, "poll_s": 0.02, "failures": 2,
            **settings,
        }
    )  # fmt: skip
    stopping, errors = threading.Event(), []

    def run() -> None:
        try:
            supervise(robot.store, chosen, stopping)
        except StoreError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield thread
    finally:
        stopping.set()
        thread.join()
    if errors:
        raise errors[0]


def begin(robot: Robot, name: str) -> None:
    with robot.store.open():
        activate(robot.store, name, MACHINE, BOOT)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("crash", {}, "ended with status 7"),
        ("hang", {"start_s": 1.0}, "is not ready"),
    ],
)
def test_a_release_that_fails_on_probation_is_left(
    robot: Robot, tmp_path: Path, name: str, settings: dict[str, object], reason: str
) -> None:
    begin(robot, name)
    log = tmp_path / "log"
    with supervised(robot, log, **settings):
        until(lambda: log.exists() and log.read_text().split() == [name, "good"])
    assert current(robot) == ("good", "proven")
    (left,) = (one for one in robot.state().releases.values() if one.name == name)
    assert left.standing == "failed" and reason in (left.reason or "")


def test_a_failed_measurement_leaves_a_release_and_a_good_one_proves_it(
    robot: Robot, tmp_path: Path
) -> None:
    begin(robot, "better")
    log = tmp_path / "log"

    def fails(*_: object) -> None:
        raise FailedProbation("too slow")

    with supervised(robot, log, measure=fails):
        until(lambda: log.exists() and log.read_text().split() == ["better", "good"])
    robot.pass_check(robot.state().find("better"))
    begin(robot, "better")
    with supervised(robot, log):
        until(lambda: current(robot) == ("better", "proven"))


def test_a_restart_of_the_machine_during_probation_goes_back(robot: Robot, tmp_path: Path) -> None:
    begin(robot, "better")
    log = tmp_path / "log"
    with supervised(robot, log, boot_id=lambda: "the next boot"):
        until(log.exists)
    assert current(robot)[0] == "good" and log.read_text().split()[0] == "good"


def test_a_proven_release_that_fails_again_and_again_is_left(robot: Robot, tmp_path: Path) -> None:
    begin(robot, "late")
    with robot.store.open():
        prove(robot.store, BOOT)
    log = tmp_path / "log"
    with supervised(robot, log):
        until(lambda: log.exists() and log.read_text().split() == ["late", "late", "good"])
    assert current(robot) == ("good", "proven")


def test_the_only_release_that_fails_ends_it(host: Host, tmp_path: Path) -> None:
    robot = Robot.of(host, tmp_path / "store")
    log = tmp_path / "log"
    with (
        pytest.raises(SupervisionEnd, match=r"no release .* is current"),
        supervised(robot, log) as thread,
    ):
        until(lambda: not thread.is_alive())
    robot.pass_check(robot.install("crash").digest)
    begin(robot, "crash")
    with (
        pytest.raises(SupervisionEnd, match="none is before it"),
        supervised(robot, log) as thread,
    ):
        until(lambda: not thread.is_alive())
    assert log.read_text().split() == ["crash", "crash"]


def test_a_switch_by_another_command_is_followed(robot: Robot, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with supervised(robot, log):
        until(lambda: log.exists() and log.read_text().split() == ["good"])
        begin(robot, "better")
        until(lambda: current(robot) == ("better", "proven"))
    assert log.read_text().split() == ["good", "better"]


def test_a_release_that_somebody_removes_is_left(robot: Robot, tmp_path: Path) -> None:
    begin(robot, "better")
    log = tmp_path / "log"
    with supervised(robot, log):
        until(lambda: current(robot) == ("better", "proven"))
        robot.store.release(robot.state().find("better")).rename(tmp_path / "elsewhere")
        until(lambda: log.read_text().split() == ["better", "good"])
    assert current(robot) == ("good", "proven")


def test_a_failing_release_is_left_while_another_is_installed(robot: Robot, tmp_path: Path) -> None:
    begin(robot, "crash")
    log = tmp_path / "log"
    # As long as a download takes.
    with robot.store.open(), supervised(robot, log):
        until(lambda: log.exists() and log.read_text().split() == ["crash", "good"])
    assert current(robot) == ("good", "proven")


@pytest.mark.parametrize("passes", [True, False])
def test_a_release_is_checked_anew_where_the_machine_has_changed(
    robot: Robot, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: bool
) -> None:
    begin(robot, "better")
    with robot.store.open():
        prove(robot.store, BOOT)
    state, checks = robot.state(), []
    digests = {digest: one.bundle_digest for digest, one in state.releases.items()}

    def check(
        account: object, arguments: tuple[object, ...], timeout_s: float
    ) -> dict[str, object]:
        digest = Path(str(arguments[1])).parent.name
        checks.append(state.releases[digest].name)
        if not passes and checks[-1] == "better":
            return {"error": "TensorRT is another one"}
        return {
            "bundle_digest": digests[digest], "breaches": [], "drift": 0.0, "runtime": "it",
            "p50_ms": 1.0, "p95_ms": 2.0, "observations": 1,
        }  # fmt: skip

    monkeypatch.setattr(checking, "_isolated", check)
    served = "better" if passes else "good"
    log = tmp_path / "log"
    with supervised(robot, log, machine=lambda: "another-machine"):
        until(lambda: log.exists() and log.read_text().split() == [served])
    # A proven one gets a second chance, as where its server fails.
    assert checks == (["better"] if passes else ["better", "better", "good"])
    assert current(robot) == (served, "proven")
    assert robot.state().releases[robot.state().find(served)].machine == "another-machine"


def test_real_servers_switch_and_a_killed_one_is_left(
    robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`qvla serve` itself: a healthy release is proven by a client, the next one is killed."""
    begin(robot, "better")
    port, served = free_port(), list[str]()
    servers: list[subprocess.Popen[bytes]] = []

    class Server(subprocess.Popen[bytes]):
        def __init__(self, words: list[str]) -> None:
            super().__init__(words)
            servers.append(self)

    def command(bundle: Path) -> list[str]:
        served.append(bundle.parent.name)
        words = [sys.executable, "-m", "qvla_export", "serve", str(bundle)]
        return [*words, "--port", str(port), "--warmup", "0", "--threads", "1"]

    def measure(*arguments: Any) -> None:
        if len(servers) == 2:
            servers[-1].kill()
        measure_probation(*arguments)

    monkeypatch.setattr(supervision.subprocess, "Popen", Server)
    terms = ProbationTerms(actions=3, seconds=0.0)
    url = f"http://127.0.0.1:{port}"
    chosen = SupervisionSettings(
        command, url, terms, boot_id=lambda: BOOT, machine=lambda: MACHINE, measure=measure
    )
    stopping = threading.Event()
    thread = threading.Thread(target=supervise, args=(robot.store, chosen, stopping))
    thread.start()
    try:
        until(lambda: current(robot) == ("better", "proven"))
        begin(robot, "late")
        until(lambda: len(servers) == 3 and answers(url))
    finally:
        stopping.set()
        thread.join()
    state = robot.state()
    assert current(robot) == ("better", "proven")
    assert served == [state.find(name) for name in ("better", "late", "better")]
    left = state.known(state.find("late"))
    assert left.standing == "failed" and "probation failed" in str(left.reason)
    assert servers[1].returncode == -signal.SIGKILL and servers[2].returncode == 0


def answers(url: str) -> bool:
    try:
        with RemotePolicy(url) as remote:
            return remote.contract.bundle_digest != ""
    except RemoteError:
        return False


def test_an_update_tries_no_release_again_that_failed_here(
    robot: Robot, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(update, "check_release", lambda *a: checked.append(a))
    request = InstallRequest()
    with robot.store.open():
        first = update.update(robot.store, request, MACHINE, BOOT)
        assert (first.name, first.changed, len(checked)) == ("better", True, 1)
        again = update.update(robot.store, request, MACHINE, BOOT)
        assert not again.changed and again.why_not == "it serves already"
    with robot.store.open():
        roll_back(robot.store, "it shook", BOOT)
        left = update.update(robot.store, request, MACHINE, BOOT)
        assert not left.changed and left.why_not == "it failed here: it shook"
        collect(robot.store, 0, BOOT)
        after = update.update(robot.store, request, MACHINE, BOOT)
        assert not after.changed and after.why_not == "it failed here: it shook"
    assert current(robot)[0] == "good" and len(checked) == 1


def test_a_probation_is_measured_through_the_server() -> None:
    with open_server(EchoPolicy(OFT), ServerSettings(port=0)) as url:
        slept: list[float] = []
        result = measure_probation(url, ProbationTerms(5, 100.0), sleep=slept.append)
        assert result.actions == 5 and 0 < result.p50_ms <= result.p95_ms <= result.max_ms
        assert len(slept) == 5 and max(slept) > 75
        with pytest.raises(FailedProbation, match=r"the limit is 0\.0 ms"):
            measure_probation(url, ProbationTerms(2, 0.0, p95_ms=1e-6))
        with pytest.raises(StoreError, match=r"serves bundle .* has 1{16}; start the server again"):
            measure_probation(url, ProbationTerms(2, 0.0), bundle_digest="1" * 64)
    with pytest.raises(FailedProbation, match="after 0 of 2 actions"):
        measure_probation(url, ProbationTerms(2, 0.0))
    assert probation.ProbationTerms().actions == 20


def test_systemd_hears_that_a_server_is_ready_and_alive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert not notify("READY=1") and watchdog_s() is None
    place = tmp_path / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(place))
        manager.settimeout(20)
        monkeypatch.setenv("NOTIFY_SOCKET", str(place))
        monkeypatch.setenv("WATCHDOG_USEC", "60000")
        able = threading.Event()
        with signs_of_life(able.is_set):
            assert notify("READY=1")
            time.sleep(0.1)
            able.set()
            # A server that is not able gave no sign of life before.
            assert manager.recv(100) == b"READY=1"
            assert manager.recv(100) == b"WATCHDOG=1"
        monkeypatch.setenv("WATCHDOG_PID", "1")
        assert watchdog_s() is None
