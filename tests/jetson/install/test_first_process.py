"""`qvla robot supervise` as PID 1, as in a container: it collects what others left, and stops."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from places import ROOT
from ports import free_port
from small_releases import Host, Robot, sum_bundle

from jetson.install.activation import activate, prove
from jetson.install.fingerprint import machine_fingerprint
from jetson.install.store_state import read_boot_id
from qvla_export.policies.oft.policy import OftPolicy

# A namespace of processes, whose first one is what is started.
NAMESPACE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child")


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end_s, "it did not come to that"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=5.0, trust_env=False).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture
def robot(tiny_policy: OftPolicy, tmp_path: Path) -> Robot:
    """A robot on which a release is proven."""
    host = Host.new(tmp_path / "host")
    host.release(sum_bundle(tiny_policy, tmp_path / "bundle", table=64, servable=True).path, "a")
    robot = Robot.of(host, tmp_path / "store")
    machine = machine_fingerprint()
    robot.pass_check(robot.install().digest, machine)
    with robot.store.open():
        activate(robot.store, "a", machine, read_boot_id())
        prove(robot.store, read_boot_id())
    return robot


def test_the_first_process_of_a_container_serves_collects_orphans_and_stops(robot: Robot) -> None:
    if subprocess.run([*NAMESPACE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets nobody make a namespace of processes")
    port = free_port()
    command = [sys.executable, "-m", "qvla_export", "robot", "supervise", "--port", str(port)]
    options = ["--store", str(robot.store.root), "--", "--warmup", "0", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([*NAMESPACE, *command, *options], env=environment) as outer:
        try:
            until(lambda: is_ready(f"http://127.0.0.1:{port}"))
            (first,) = children(outer.pid)
            (server,) = children(first)
            # A process of the namespace whose parent ends before it does.
            enter = ["nsenter", "--target", str(first), "--user", "--pid"]
            orphan = "sleep 600 & echo left"
            said = subprocess.run([*enter, "sh", "-c", orphan], stdout=subprocess.DEVNULL)
            assert said.returncode == 0
            until(lambda: len(children(first)) == 2)
            (sleeping,) = set(children(first)) - {server}
            os.kill(sleeping, signal.SIGKILL)
            until(lambda: children(first) == [server])
            os.kill(first, signal.SIGTERM)
            assert outer.wait(60) == 0
        finally:
            outer.kill()
    assert not is_ready(f"http://127.0.0.1:{port}")
